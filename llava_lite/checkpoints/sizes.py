"""Compare the sizes in a config with the shapes in the headers of the weights, before a model is built."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

# A matrix that a config describes may have so many times the values that all files hold: packed in 4 bits, eight
# values are stored as one, and a model may share one matrix for several.
SLACK = 64
# Below, a model is built in a moment, and its weights are compared one by one.
SMALL = 2**28
FEW_LAYERS = 256
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def check_sizes(checkpoint, config, shapes: Mapping[str, Iterable[int]], with_vision: bool = True) -> None:
    """Raise ValueError for a config that describes far more weights than a checkpoint holds.

    shapes: of the weights by name, as in the headers of their files. with_vision: whether the tower's are among them.
    """
    if not shapes:
        # That no weights are there is said by who reads them.
        return
    held = sum(math.prod(shape) for shape in shapes.values())
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    described = dict(describe(text))
    vision = getattr(config, "vision_config", None)
    if with_vision and vision is not None:
        described |= {f"vision_config.{name}": count for name, count in describe(vision)}
    for name, count in described.items():
        if count > SMALL and count > SLACK * held:
            raise ValueError(
                f"config.json of {str(checkpoint)!r} describes {count:,} weights ({name}), and its files hold "
                f"{held:,}. Its config.json belongs to another checkpoint, or was changed."
            )
    layers = getattr(text, "num_hidden_layers", None) or 0
    if layers > max(len(shapes), FEW_LAYERS):
        raise ValueError(
            f"config.json of {str(checkpoint)!r} names {layers:,} layers (num_hidden_layers), and its files hold "
            f"{len(shapes):,} weights in all. Its config.json belongs to another checkpoint, or was changed."
        )


def check_connector(checkpoint, config, shapes: Mapping[str, Iterable[int]]) -> None:
    """Raise ValueError if mm_hidden_size is larger than any side of the connector's weights, where there are some."""
    sides = [side for name, shape in shapes.items() if "mm_projector." in name for side in shape]
    width = getattr(config, "mm_hidden_size", None)
    # Packed in a few bits a matrix is a column, whose side is no width; it is larger.
    if sides and width is not None and width > max(sides):
        raise ValueError(
            f"config.json of {str(checkpoint)!r} says mm_hidden_size {width:,}, and no side of its connector's "
            f"weights is larger than {max(sides):,}. Its config.json belongs to another checkpoint, or was changed."
        )


def describe(config) -> list[tuple[str, int]]:
    """Return (the fields that make it, the number of values) of the largest parts of a decoder or tower."""

    def of(*names) -> int:
        found = next((value for name in names if (value := getattr(config, name, None)) is not None), 0)
        return max(found, default=0) if isinstance(found, (list, tuple)) else found

    layers, width = of("num_hidden_layers", "depth"), of("hidden_size", "n_embd", "embed_dim")
    mlp, heads = of("moe_intermediate_size", "intermediate_size", "mlp_dim"), of("num_attention_heads", "num_heads")
    experts = max(1, of(*EXPERTS), most_experts(config))
    places = (of("image_size") // max(1, of("patch_size"))) ** 2
    parts = [
        ("vocab_size x hidden_size", of("vocab_size") * width),
        ("num_hidden_layers x hidden_size x hidden_size", layers * width * width),
        ("num_hidden_layers x hidden_size x intermediate_size", layers * width * mlp),
        ("num_hidden_layers x num_attention_heads x head_dim x hidden_size", layers * heads * of("head_dim") * width),
        ("(image_size / patch_size)^2 x hidden_size", places * width),
    ]
    if experts > 1:
        parts.append(("num_hidden_layers x experts x hidden_size x their width", layers * experts * width * mlp))
    return [(name, count) for name, count in parts if isinstance(count, int)]


def most_experts(config) -> int:
    """Return the largest number of experts of a layer in `config.moe`."""
    named = (getattr(config, "moe", None) or {}).get("num_experts", 0)
    return max(named, default=0) if isinstance(named, (list, tuple)) else named
