"""Turn the visual query of LLaMA-Adapter V2 and of LLaMA2-Accessory's llama_adapter into our connector query_vit.

K queries, W width of its layers, C width of the tower's features, D model width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from llava_lite.formats.llama_shapes import with_biases

PLACE = "model.mm_projector."
# The originals' modules in their order -> ours. Accessory's visual_query is a bare parameter.
MODULES = {
    "clip_proj": "input_proj",
    "clip_proj_norm": "input_norm",
    "visual_query": "query",
    "visual_proj": "output_proj",
    "visual_proj_norm": "output_norm",
}
QUERIES = ("visual_query.weight", "visual_query")
# Keys of the config that shapes depend on.
SIZES = ("mm_query_len", "mm_query_hidden", "mm_query_mlp_ratio", "mm_hidden_size", "hidden_size")

_BLOCK = re.compile(r"visual_blocks\.(\d+)\..+")


def our_name(name: str) -> str | None:
    """Return our name of one of the originals' weights, None for one that is not of the visual query."""
    if name in QUERIES:
        return f"{PLACE}query"
    if name.startswith("visual_blocks."):
        return PLACE + name.removeprefix("visual_")
    module, _, kind = name.partition(".")
    return f"{PLACE}{MODULES[module]}.{kind}" if module in MODULES and module != "visual_query" else None


def original_name(name: str) -> str | None:
    """Return LLaMA-Adapter V2's name of one of our connector's weights, None for a weight of something else."""
    inner = name.removeprefix(PLACE)
    if inner == "query":
        return QUERIES[0]
    if inner.startswith("blocks."):
        return f"visual_{inner}"
    theirs = {ours: module for module, ours in MODULES.items()}.get(inner.partition(".")[0])
    return None if theirs is None or inner == name else f"{theirs}.{inner.partition('.')[2]}"


def get_shapes(depth: int, config: Mapping, query: str = QUERIES[0]) -> dict[str, tuple[int, ...]]:
    """Return {original's name: shape} of all weights, in the order of their modules. query: the queries' name."""
    width, model_width = config["mm_query_hidden"], config["hidden_size"]
    inner = int(width * config["mm_query_mlp_ratio"])
    block = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width), "norm2": (width,)}
    block |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    before = {"clip_proj": (width, config["mm_hidden_size"]), "clip_proj_norm": (width,)}
    after = {f"visual_blocks.{i}.{module}": shape for i in range(depth) for module, shape in block.items()}
    after |= {"visual_proj": (model_width, width), "visual_proj_norm": (model_width,)}
    return with_biases(before) | {query: (config["mm_query_len"], width)} | with_biases(after)


def names(depth: int, query: str = QUERIES[0]) -> list[str]:
    """Return the originals' names of all weights, in the order of their modules."""
    return list(get_shapes(depth, dict.fromkeys(SIZES, 0), query))


def depth_of(state: Iterable[str]) -> int:
    """Return the number of blocks among names of the originals."""
    return 1 + max((int(match[1]) for match in map(_BLOCK.fullmatch, state) if match), default=-1)


def query_name(state: Iterable[str]) -> str:
    """Return the name of the queries in a checkpoint."""
    return QUERIES[1] if QUERIES[1] in state else QUERIES[0]


def is_there(state: Iterable[str]) -> bool:
    """Tell whether a checkpoint holds a visual query, or a part of one."""
    return any(our_name(name) for name in state)


def config_from_weights(state: Mapping[str, torch.Tensor], hidden_size: int) -> dict:
    """Return the config keys of the connector as the shapes say, all but mm_query_heads.

    hidden_size: of the base. Raises ValueError for what is missing, and for another width with both numbers.
    """
    check_names(state)
    queries, width = state[query_name(state)].shape
    fields = {
        "mm_projector_type": "query_vit",
        "mm_query_len": queries,
        "mm_query_hidden": width,
        "mm_query_depth": depth_of(state),
        "mm_query_mlp_ratio": len(state["visual_blocks.0.mlp.fc1.weight"]) / width,
        "mm_hidden_size": state["clip_proj.weight"].shape[1],
    }
    check_shapes(state, fields | {"hidden_size": hidden_size})
    return fields


def weights_from(state: Mapping[str, torch.Tensor], config: Mapping) -> dict[str, torch.Tensor]:
    """Return the connector's weights under our names; names of other parts are left alone.

    Raises ValueError for what is missing, and for a shape that is not that of the config.
    """
    check_names(state)
    check_shapes(state, config)
    return {our_name(name): tensor for name, tensor in state.items() if our_name(name)}


def check_names(state: Mapping) -> None:
    """Raise ValueError for weights of the visual query that are missing, and for such as it does not have."""
    present = {name for name in state if our_name(name)}
    wanted = set(names(max(depth_of(state), 1), query_name(state)))
    missing, unknown = sorted(wanted - present), sorted(present - wanted)
    if missing or unknown:
        raise ValueError(
            f"the visual query is incomplete: missing {missing[:4]} ({len(missing)} in all), not known {unknown[:4]} "
            f"({len(unknown)} in all). Give a checkpoint that holds all of it."
        )


def check_shapes(state: Mapping, config: Mapping) -> None:
    """Raise ValueError with both shapes where a weight of the visual query is not as the config says."""
    for name, expected in get_shapes(depth_of(state), config, query_name(state)).items():
        if tuple(state[name].shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)} and {expected} is expected, with a base of width "
                f"{config['hidden_size']} and a visual query of width {config['mm_query_hidden']}. It belongs to "
                "another base or config."
            )
