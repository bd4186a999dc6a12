"""Put a model together: a plain LLM plus a tower, or a LLaVA checkpoint with some choices changed."""

from __future__ import annotations

import logging
from typing import Any

from llava_lite.hub import everywhere, hub_arguments, in_words
from llava_lite.model import model_class_for
from llava_lite.model.attention import choose_attention
from llava_lite.model.builder import config_of
from llava_lite.model.configuration import load_vision_config
from llava_lite.model.loading import CONNECTOR, NEWLINE, TOWER
from llava_lite.model.partial import load_trained
from llava_lite.model.weights import load_into, read_weights
from llava_lite.pictures import load_image_processor, picture_side

logger = logging.getLogger(__name__)


def assemble(
    model_name_or_path: str, vision_tower: str | None = None, *, config_overrides: dict | None = None, **kwargs
):
    """Return a LLaVA model, in eval mode.

    model_name_or_path: a plain LLM (Llama, Mistral, Phi, Qwen2, Qwen3, StableLM), or a LLaVA model. vision_tower: hub
    id or path of the tower; None keeps that of a LLaVA model, and gives a text-only model otherwise. config_overrides:
    config keys to set (mm_projector_type, mm_vision_select_layer, ...). kwargs go to `from_pretrained`. A connector
    that the checkpoint lacks starts from random weights. Raises ValueError for an unknown decoder, tower or connector.
    """
    hub = hub_arguments(kwargs)
    with in_words(model_name_or_path, **hub):
        stock = config_of(model_name_or_path, hub)
    model_class = model_class_for(stock.model_type)
    overrides = dict(config_overrides or {})
    if stock.model_type.startswith("llava_"):
        return reopen(model_class, model_name_or_path, stock, vision_tower, overrides, kwargs)
    config = model_class.config_class(**(text_fields(stock) | overrides | tower_fields(vision_tower, hub)))
    spell_out_pinpoints(config)
    kwargs["attn_implementation"] = choose_attention(kwargs.pop("attn_implementation", None))
    model, _ = model_class._open_whole(
        model_name_or_path, config=config, hub=hub, new_parts=(CONNECTOR, TOWER, NEWLINE), **kwargs
    )
    return model


def reopen(model_class, path: str, config, vision_tower: str | None, overrides: dict, kwargs: dict):
    """Open a LLaVA checkpoint; another tower than its own is refused, since its connector was trained for that one."""
    own, had_newline = config.mm_vision_tower, config.has_newline
    if vision_tower is not None and own is not None and vision_tower != own:
        logger.warning("%s was trained with tower %r; %r is taken as another copy of it.", path, own, vision_tower)
        config.mm_vision_tower = vision_tower
    if vision_tower is not None and not config.has_vision_tower:
        raise ValueError(
            f"{path!r} is a LLaVA checkpoint without a tower; start from its plain LLM to add {vision_tower!r}."
        )
    fixed = {"mm_projector_type"} if config.has_vision_tower else set()
    for key, value in overrides.items():
        if key in fixed and value != getattr(config, key):
            raise ValueError(
                f"{path!r} has {key} {getattr(config, key)!r}; {value!r} was asked for. "
                "Leave the flag out to keep its own."
            )
        setattr(config, key, value)
    spell_out_pinpoints(config)
    if config.has_newline and not had_newline:
        kwargs["new_parts"] = (NEWLINE,)
    return model_class.from_pretrained(path, config=config, **kwargs)


def spell_out_pinpoints(config) -> None:
    """Write the resolutions of `anyres` into the config as pairs of pixels, which LLaVA's own code reads too."""
    if config.has_vision_tower and config.image_aspect_ratio == "anyres":
        config.image_grid_pinpoints = [list(pair) for pair in config.picture_layout.pinpoints]


def text_fields(stock) -> dict[str, Any]:
    """Return a text config's fields without what names its class."""
    fields = stock.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "_name_or_path", "torch_dtype"):
        fields.pop(key, None)
    return fields


def tower_fields(vision_tower: str | None, hub: dict | None = None) -> dict[str, Any]:
    """Return the config keys that name a tower and its shape; its weights are saved with the model from now on."""
    if vision_tower is None:
        return {}
    vision = load_vision_config(vision_tower, **everywhere(hub or {}))
    fields = {"mm_vision_tower": vision_tower, "vision_config": vision, "mm_hidden_size": vision.hidden_size}
    if vision.model_type == "dinov2":
        # DINOv2's positions are for 518 px while its processor crops to 224: feed what the processor gives.
        fields["mm_image_size"] = picture_side(load_image_processor(vision_tower))
    return fields


def load_connector(model, path: str) -> None:
    """Fill a model's connector from LLaVA's `mm_projector.bin` (or .safetensors), whatever prefix its keys carry.

    The newline of LLaVA-1.6 is taken too where the model has one and the file holds it; else it stays as it was drawn.
    Raises ValueError with both shapes if it was trained for another width.
    """
    fill_connector(model.get_model().mm_projector, path)
    if not model.config.has_newline:
        return
    newlines = [tensor for name, tensor in read_weights(path).items() if name.endswith("image_newline")]
    if newlines:
        load_trained(model, {NEWLINE: newlines[0]}, f"weights of {path!r}")
    else:
        logger.info("%s holds no image_newline, which starts from random numbers.", path)


def fill_connector(connector, path: str) -> None:
    """Fill a connector from the weights in a file whose names hold `mm_projector.`."""
    weights = read_weights(path)
    picked = {}
    for name, tensor in weights.items():
        if "mm_projector." in name:
            picked[name.split("mm_projector.", 1)[1].removeprefix("image_spatial_proj.")] = tensor
    if not picked:
        raise ValueError(f"{path!r} holds no mm_projector weights; found {sorted(weights)[:5]}.")
    load_into(connector, picked, f"connector weights of {path!r}")
