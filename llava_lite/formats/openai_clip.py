"""Turn OpenAI's CLIP image encoder (its own names) into transformers' CLIPVisionModelWithProjection.

Radford et al. 2021, arXiv 2103.00020. There queries, keys and values are one matrix, and the projection is applied
from the right. W width, E projection's width, P patches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import product

import torch

from llava_lite.formats.llava import clip_vision_fields

NAMES = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    # Spelled so in transformers.
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
    "proj": "visual_projection.weight",
}
LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# attn.in_proj_weight, attn.in_proj_bias: three in one.
PACKED = ("q_proj", "k_proj", "v_proj")
# The text encoder's, which checkpoints keep in part or in full and no image needs.
TEXT = ("transformer.", "token_embedding.", "ln_final.", "positional_embedding", "text_projection", "logit_scale")
TEXT += ("attn_mask", "logit_bias")

_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")


@lru_cache
def get_names(num_layers: int) -> dict[str, tuple[str, ...]]:
    """Return {OpenAI's name: transformers' names, three of what is packed} of an encoder with so many layers."""
    names = {theirs: (ours,) for theirs, ours in NAMES.items()}
    for layer, kind in product(range(num_layers), ("weight", "bias")):
        block, place = f"transformer.resblocks.{layer}.", f"vision_model.encoder.layers.{layer}."
        names |= {f"{block}{theirs}.{kind}": (f"{place}{ours}.{kind}",) for theirs, ours in LAYER.items()}
        names[f"{block}attn.in_proj_{kind}"] = tuple(f"{place}self_attn.{part}.{kind}" for part in PACKED)
    return names


def is_text(name: str, prefix: str = "clip.") -> bool:
    """Tell whether a weight is of the text encoder beside the image encoder, in a checkpoint with this prefix."""
    return name.startswith(prefix) and name.removeprefix(prefix).startswith(TEXT)


def config_from_shapes(shapes: Mapping, prefix: str = "clip.visual.", num_heads: int | None = None) -> dict:
    """Return the fields of transformers' CLIPVisionConfig from the shapes of the weights.

    shapes: name -> shape, or the tensors. num_heads: default a head for every 64 of width, as in every CLIP that
    OpenAI released. Raises ValueError for weights that are missing.
    """
    shapes = {
        name.removeprefix(prefix): tuple(getattr(value, "shape", value))
        for name, value in shapes.items()
        if name.startswith(prefix)
    }
    _check_names(shapes, prefix)
    patches, (num_positions, _) = shapes["conv1.weight"], shapes["positional_embedding"]
    inner, _ = shapes["transformer.resblocks.0.mlp.c_fc.weight"]
    fields = clip_vision_fields(patches, num_positions, inner, _num_layers(shapes))
    num_heads = num_heads or fields["num_attention_heads"]
    if patches[0] % num_heads:
        raise ValueError(f"{prefix}conv1.weight has width {patches[0]}, which {num_heads} heads do not divide.")
    more = {"model_type": "clip_vision_model", "projection_dim": shapes["proj"][1], "layer_norm_eps": 1e-5}
    return fields | more | {"num_attention_heads": num_heads}


def weights_from(state: Mapping[str, torch.Tensor], prefix: str = "clip.visual.") -> dict[str, torch.Tensor]:
    """Return the weights under the names of CLIPVisionModelWithProjection; views of the same memory.

    Only names that begin with `prefix` are read. Raises ValueError for one that is not known or missing.
    """
    named = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    _check_names(named, prefix)
    weights, names = {}, get_names(_num_layers(named))
    for name, tensor in named.items():
        parts = (tensor.T if name == "proj" else tensor).chunk(len(names[name]))
        weights |= zip(names[name], parts, strict=True)
    return weights


def weights_to(weights: Mapping[str, torch.Tensor], prefix: str = "clip.visual.") -> dict[str, torch.Tensor]:
    """Return the weights of CLIPVisionModelWithProjection under OpenAI's names, the inverse of `weights_from`.

    Raises ValueError for a name that is not of it.
    """
    named = {}
    for name in weights:
        named.setdefault(openai_name(name), []).append(name)
    if None in named:
        raise ValueError(f"OpenAI's CLIP image encoder has no place for {named[None][:4]}.")
    state = {}
    for theirs, ours in named.items():
        parts = [weights[name] for part in PACKED for name in ours if f".{part}." in name] or [weights[ours[0]]]
        state[f"{prefix}{theirs}"] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if f"{prefix}proj" in state:
        state[f"{prefix}proj"] = state[f"{prefix}proj"].T
    return state


def openai_name(name: str) -> str | None:
    """Return OpenAI's name, without a prefix, of one of transformers' weights; None for one that is not of CLIP."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    names = get_names(int(layer[1]) + 1 if layer else 0)
    return next((theirs for theirs, ours in names.items() if name in ours), None)


def _num_layers(names) -> int:
    found = [_BLOCK.match(name) for name in names]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _check_names(names, prefix) -> None:
    wanted = set(get_names(max(_num_layers(names), 1)))
    missing, unknown = sorted(wanted - set(names)), sorted(set(names) - wanted)
    if missing or unknown:
        raise ValueError(
            f"these are not the weights of OpenAI's CLIP image encoder under {prefix!r}: missing {missing[:4]} "
            f"({len(missing)} in all), not known {unknown[:4]} ({len(unknown)} in all)."
        )
