"""Put a model together: an LLM and a vision tower, a LLaVA checkpoint with other config keys, or weights in memory."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping

import torch

from llava_lite.checkpoints.config import is_llava
from llava_lite.checkpoints.copying import read_weights
from llava_lite.checkpoints.partial import fill_connector, load_trained, merge_lora
from llava_lite.checkpoints.source import Checkpoint
from llava_lite.configuration import config_class_for, get_text_fields
from llava_lite.formats.llama_shapes import lora_fields
from llava_lite.model import model_class_for
from llava_lite.model.attention import choose_attention
from llava_lite.model.loading import CONNECTOR, TOWER, get_new_weights
from llava_lite.tower_config import get_tower_fields

logger = logging.getLogger(__name__)

EMBEDDINGS = "model.embed_tokens.weight"
PEFT_PREFIX = "base_model.model."
IS_LORA = re.compile(r"\.lora_[AB]\.")

# Keys of a checkpoint with a tower that its weights were trained for.
FIXED = {"mm_projector_type", "mm_injection", "mm_vision_projection", "adaption_prompt_len", "adaption_prompt_layers"}
FIXED |= {"mm_query_len", "mm_query_hidden", "mm_query_depth", "mm_query_heads", "mm_query_mlp_ratio"}
FIXED |= {"mm_gate_expansion", "mm_gate_norm", "mm_boundary_vectors"}


def assemble(model, vision_tower: str | None = None, *, config_overrides: dict | None = None, **kwargs):
    """Return a LLaVA model, in eval mode.

    model: directory, hub id or Checkpoint of a plain LLM (Llama, Mistral, Phi, Qwen2, Qwen3, StableLM) or of a LLaVA
    model. vision_tower: hub id or path of the tower; None keeps that of a LLaVA model, and gives a text-only model
    otherwise. config_overrides: config keys to set (mm_projector_type, mm_vision_select_layer, ...). kwargs go to
    `from_pretrained`. A connector that the checkpoint lacks starts from random weights. Raises ValueError for an
    unknown decoder, tower or connector.
    """
    checkpoint = Checkpoint.open(model, kwargs)
    config = get_run_config(checkpoint, vision_tower, config_overrides)
    model_class = model_class_for(config.model_type)
    if is_llava(checkpoint.config):
        new_parts = get_new_weights(config, checkpoint.config)
        return model_class.from_pretrained(checkpoint, config=config, new_parts=new_parts, **kwargs)
    kwargs["attn_implementation"] = choose_attention(kwargs.pop("attn_implementation", None))
    new_parts = (CONNECTOR, TOWER, *get_new_weights(config))
    model, _ = model_class.open_complete(checkpoint, config, new_parts=new_parts, **kwargs)
    return model


def get_run_config(checkpoint: Checkpoint, vision_tower: str | None = None, config_overrides: dict | None = None):
    """Return the config of the model that `assemble` makes, from configs alone; ValueError for what does not fit."""
    config, overrides = copy.deepcopy(checkpoint.config), dict(config_overrides or {})
    if is_llava(config):
        override(config, checkpoint.path, vision_tower, overrides)
    else:
        fields = get_text_fields(config) | overrides | get_tower_fields(vision_tower, **checkpoint.shared_keywords)
        config = model_class_for(config.model_type).config_class(**fields)
    spell_out_pinpoints(config)
    return config


def override(config, path, vision_tower: str | None, overrides: dict) -> None:
    """Set keys in the config of a LLaVA checkpoint; its connector was trained for its own tower and type."""
    own = config.mm_vision_tower
    if vision_tower is not None and own is not None and vision_tower != own:
        logger.warning("%s was trained with tower %r; %r is taken as another copy of it.", path, own, vision_tower)
        config.mm_vision_tower = vision_tower
    if vision_tower is not None and not config.has_vision_tower:
        raise ValueError(
            f"{path!r} is a LLaVA checkpoint without a tower; start from its plain LLM to add {vision_tower!r}."
        )
    fixed = FIXED if config.has_vision_tower else set()
    for key, value in overrides.items():
        if key in fixed and value != getattr(config, key):
            raise ValueError(
                f"{path!r} has {key} {getattr(config, key)!r}; {value!r} was asked for. "
                "Leave the flag out to keep its own."
            )
        setattr(config, key, value)


def spell_out_pinpoints(config) -> None:
    """Write the resolutions of `anyres` into the config as pairs of pixels, which LLaVA's own code reads too."""
    if config.has_vision_tower and config.image_aspect_ratio == "anyres":
        config.image_grid_pinpoints = [list(pair) for pair in config.image_layout.pinpoints]


def load_connector(model, path: str) -> None:
    """Fill a model's connector from LLaVA's `mm_projector.bin` (or .safetensors), whatever the prefix of its keys.

    The vectors among the features of images (LLaVA-1.6's newline) are copied too if the model has them and the file
    holds them; else they keep their random values.
    Raises ValueError with both shapes if the connector was trained for another width.
    """
    fill_connector(model.get_model().mm_projector, path)
    weights = read_weights(path)
    for vector in model.config.image_vectors:
        found = [tensor for name, tensor in weights.items() if name.endswith(vector)]
        if found:
            load_trained(model, {f"model.{vector}": found[0]}, f"weights of {path!r}")
        else:
            logger.info("%s holds no %s, which starts from random numbers.", path, vector)


class HeldWeights(Checkpoint):
    """A checkpoint in memory: the fields of its config.json and its weights, both under our names."""

    def __init__(self, fields: Mapping, weights: Mapping[str, torch.Tensor], name: str = "the checkpoint"):
        super().__init__(None)
        self._fields, self._weights, self._name = dict(fields), dict(weights), name

    def __str__(self) -> str:
        return self._name

    @property
    def fields(self) -> dict:
        """The fields."""
        return self._fields

    @property
    def format(self):
        """Itself: what reads the weights."""
        return self

    def weights(self) -> dict:
        """Return the weights."""
        return self._weights

    def weights_from(self, weights: dict, fields: dict) -> dict:
        """Return the weights, whose names are ours already."""
        return weights


def model_from_weights(fields: Mapping, weights: Mapping[str, torch.Tensor], dtype=None, attn_implementation=None):
    """Return a model of the fields of a config and of weights under our names, in eval mode.

    The weights of a named vision tower may be absent: they are then read from it. A LoRA among the weights is put in
    and merged where prompts do not pass it. dtype: None for that of the embeddings. Raises ValueError with the names
    of weights that are missing, unknown or of another shape.
    """
    lora = {name: weight for name, weight in weights.items() if IS_LORA.search(name)}
    weights = {name: weight for name, weight in weights.items() if name not in lora}
    fields = dict(fields)
    config = config_class_for(fields.pop("model_type"))(**fields)
    stored = weights.get(EMBEDDINGS, next(iter(weights.values()))).dtype
    model, _ = model_class_for(config.model_type).open_complete(
        HeldWeights(fields, weights),
        config,
        dtype=stored if dtype is None else dtype,
        attn_implementation=choose_attention(attn_implementation),
    )
    # It has no directory.
    model.config.name_or_path = ""
    return add_lora(model, lora).eval()


def add_lora(model, lora: Mapping[str, torch.Tensor]):
    """Return a model with a LoRA under our names put in, and merged where prompts do not pass it."""
    if not lora:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("the checkpoint holds a LoRA; install peft (pip install 'llava-lite[peft]').") from error
    options = lora_fields(lora)
    targets = "|".join(options.pop("target_modules"))
    pattern = rf"model\.layers\.\d+\.(self_attn|mlp)\.({targets})"
    tuned = get_peft_model(model, LoraConfig(target_modules=pattern, **options), autocast_adapter_dtype=False)
    parameters = dict(tuned.named_parameters())
    places = {name: PEFT_PREFIX + re.sub(r"(lora_[AB])\.", r"\1.default.", name) for name in lora}
    unknown = sorted(name for name, place in places.items() if place not in parameters)
    missing = sorted({name for name in parameters if ".lora_" in name} - set(places.values()))
    if unknown or missing:
        raise ValueError(f"the LoRA does not fit: the model has no {unknown[:4]}, the checkpoint no {missing[:4]}.")
    with torch.no_grad():
        for name, place in places.items():
            parameters[place].copy_(lora[name])
    return merge_lora(tuned)
