"""Turn checkpoints of LLaMA-Adapter V2, multimodal, into our weights and back.

Gao et al. 2023, arXiv 2304.15010; https://github.com/OpenGVLab/LLaMA-Adapter, llama_adapter_v2_multimodal7b. Releases
(BIAS, LORA-BIAS, CAPTION) hold what was trained; a run's checkpoint-N.pth holds the base and CLIP too. The keys tell
which. LoRA is added as it is (lora_alpha is the rank): `llama_shapes.lora_fields`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llava_lite.formats import openai_clip, query_vit
from llava_lite.formats.gated_prompts import (
    FIELDS,
    LLAMA,
    PROMPTS,
    TOWER,
    base_fields,
    get_fields,
    get_state,
    inspect_llama,
    llama_from,
    llama_peer_name,
    plain_weights,
    prompt_fields,
    prompts_from,
    refuse_unknown,
    require,
    resolve,
    without_prefix,
    write_release,
)
from llava_lite.formats.llama_shapes import lora_rank

WHAT = "weights of LLaMA-Adapter V2"
TABLE = "adapter_query.weight"
CLIP = "clip.visual."
CLIP_NAME = "openai/clip-vit-large-patch14"
# Width, layers, image size and projection of that tower.
CLIP_SHAPE = (1024, 24, 224, 768)
# How the visual query, Accessory's too, reads CLIP.
CLIP_FIELDS = {
    "mm_vision_projection": True,
    "mm_vision_select_layer": -1,
    "mm_vision_select_feature": "cls_patch",
    "mm_query_heads": 16,
}
# The released weights read images whose colours are in OpenCV's order.
DEFAULTS = FIELDS | CLIP_FIELDS | {"image_channels": "bgr"}


def claims(state: Mapping) -> bool:
    """Tell whether a checkpoint (its weights, or what holds them under "model") is of LLaMA-Adapter V2."""
    return TABLE in get_state(state)


def config_from(params: Mapping, state: Mapping, **options) -> dict:
    """Return the fields of our config for a base's params.json and a checkpoint.

    options: config keys that weights do not tell, such as mm_query_heads (default 16), image_channels (default bgr, as
    the releases), vision_config, and vocab_size where params.json says -1 (default 32000 without embeddings). Raises
    ValueError with both numbers for a base of another width, number of heads or layers, or vocabulary.
    """
    state = get_state(state)
    base = base_fields(params, state.get(f"{LLAMA}tok_embeddings.weight"), options.pop("vocab_size", None))
    require(state, [TABLE], WHAT)
    told = query_vit.config_from_weights(state, base["hidden_size"])
    told |= prompt_fields(state[TABLE], told["mm_query_len"], base, WHAT)
    told |= inspect_llama(without_prefix(state, LLAMA), base, WHAT)
    tower = clip_fields(state, told["mm_hidden_size"])
    return resolve({**base, **DEFAULTS, **tower}, told, options)


def clip_fields(state: Mapping, width: int) -> dict:
    """Return the config keys of the tower: of CLIP's weights in the checkpoint, else its name on the Hub.

    width: of the features that the connector reads. Raises ValueError with both numbers for a tower of another width.
    """
    if not any(name.startswith(CLIP) for name in state):
        return {"mm_vision_tower": CLIP_NAME if width == CLIP_SHAPE[-1] else None}
    vision = openai_clip.config_from_shapes(state, CLIP)
    if vision["projection_dim"] != width:
        raise ValueError(
            f"CLIP projects to a width of {vision['projection_dim']} and the connector reads {width}. They belong to "
            "different models."
        )
    shape = tuple(vision[key] for key in ("hidden_size", "num_hidden_layers", "image_size", "projection_dim"))
    return {"mm_vision_tower": CLIP_NAME if shape == CLIP_SHAPE else None, "vision_config": vision}


def weights_from(state: Mapping, config) -> dict[str, torch.Tensor]:
    """Return a checkpoint's weights under our names, views where possible; the base and CLIP if it holds them.

    Raises ValueError for a name that is not known or missing, and for a shape that is not that of the config.
    """
    state, config = get_state(state), get_fields(config)
    # Those of the LLaMA and of CLIP's image encoder are looked at later.
    others = (name for name in state if name != TABLE and not name.startswith((LLAMA, CLIP)))
    refuse_unknown((name for name in others if not query_vit.our_name(name) and not openai_clip.is_text(name)), WHAT)
    weights = llama_from(state, config, WHAT) | query_vit.weights_from(state, config)
    return weights | prompts_from(state, config, TABLE, WHAT) | clip_from(state)


def clip_from(state: Mapping) -> dict[str, torch.Tensor]:
    """Return CLIP's weights under our names, {} if the checkpoint does not hold them."""
    if not any(name.startswith(CLIP) for name in state):
        return {}
    return {f"{TOWER}{name}": tensor for name, tensor in openai_clip.weights_from(state, CLIP).items()}


def weights_to(state: Mapping, config) -> dict[str, torch.Tensor]:
    """Return our weights in the layout of a release, without base and tower; see `write_release`."""
    config = get_fields(config)
    connector = {name: query_vit.our_name(name) for name in query_vit.names(config["mm_query_depth"])}
    return write_release(state, config, TABLE, connector)


def release(state: Mapping, config) -> dict:
    """Return the content of a release's .pth file: the weights under "model", what they are under "config"."""
    weights = plain_weights(state)
    rank = lora_rank(weights)
    kinds = {"w_bias": bool(get_fields(config).get("decoder_bias")), "w_lora": rank is not None}
    # torch.save writes all of the memory that a tensor is a view of.
    model = {name: tensor.detach().clone() for name, tensor in weights_to(weights, config).items()}
    return {"model": model, "config": kinds | {"lora_rank": rank or 16}}


def peer_name(name: str, config=None) -> str:
    """Return the original's name of one of our weights; three of CLIP's are one there. ValueError if it has none."""
    [plain] = plain_weights({name: None})
    inside = openai_clip.openai_name(plain.removeprefix(TOWER)) if plain.startswith(TOWER) else None
    found = TABLE if plain == PROMPTS else llama_peer_name(plain) or query_vit.original_name(plain)
    found = f"{CLIP}{inside}" if inside else found
    if found is None:
        raise ValueError(f"LLaMA-Adapter V2 has no weight for {name!r}.")
    return found
