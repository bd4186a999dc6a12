"""Turn checkpoints of ImageBind-LLM into our weights and back.

Han et al. 2023, arXiv 2309.03905; https://github.com/OpenGVLab/LLaMA-Adapter, imagebind_LLM. 7B.pth and
7B-pretrained.pth hold what was trained, checkpoint-N.pth holds the base and ImageBind too. The first releases have
LayerNorm and biases in the bind network: told by the key `image_bind_f1_1.bias`. ImageBind's weights keep its names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

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
from llava_lite.formats.llama_shapes import check_connector, with_biases

WHAT = "weights of ImageBind-LLM"
TABLE = "prefix_query.weight"
ENCODER = "image_bind."
CONNECTOR = "model.mm_projector."
LEGACY = "image_bind_f1_1.bias"
# F2 silu(F1 x) * F3 x is down(silu(gate x) * up x).
MLP = {"f1": "gate_proj", "f2": "down_proj", "f3": "up_proj"}
# Left over from an earlier model, in no computation.
DROPPED = ("prefix_projector_norm.weight", "prefix_projector_norm.bias")
DEFAULTS = FIELDS | {
    "mm_vision_tower": "imagebind_huge",
    "mm_vision_select_feature": "pooled",
    "image_channels": "rgb",
}

_THEIRS = re.compile(r"image_bind_(norm|f[123])_(\d+)\.(weight|bias)")


def claims(state: Mapping) -> bool:
    """Tell whether a checkpoint (its weights, or what holds them under "model") is of ImageBind-LLM."""
    return TABLE in get_state(state)


def our_name(name: str) -> str | None:
    """Return our name of a weight of the bind network, None for one that is not of it."""
    if name in ("image_bind_proj.weight", "image_bind_proj.bias"):
        return CONNECTOR + name.removeprefix("image_bind_")
    match = _THEIRS.fullmatch(name)
    if match is None:
        return None
    part, number, kind = match[1], int(match[2]) - 1, match[3]
    return f"{CONNECTOR}norms.{number}.{kind}" if part == "norm" else f"{CONNECTOR}mlps.{number}.{MLP[part]}.{kind}"


def original_name(name: str) -> str | None:
    """Return the original's name of one of our connector's weights, None for a weight of something else."""
    number = re.search(r"\.(\d+)\.", name.removeprefix(CONNECTOR))
    names = bind_names(1 + int(number[1]) if number else 0, is_legacy=True)
    return next((theirs for theirs in names if our_name(theirs) == name), None)


def bind_names(depth: int, is_legacy: bool) -> list[str]:
    """Return the names of the bind network's weights, in the order of its modules."""
    kinds = ("weight", "bias") if is_legacy else ("weight",)
    parts = [f"image_bind_{part}_{i + 1}" for i in range(depth) for part in ("norm", *MLP)]
    return ["image_bind_proj.weight", "image_bind_proj.bias", *(f"{part}.{kind}" for part in parts for kind in kinds)]


def depth_of(names: Iterable[str]) -> int:
    """Return the number of gated MLPs among the original's names, at least 1."""
    return max((int(match[2]) for match in map(_THEIRS.fullmatch, names) if match), default=1)


def check_bind(state: Mapping, config: Mapping) -> None:
    """Raise ValueError for weights of the bind network that are missing or too many, or of another shape.

    config: has hidden_size, mm_hidden_size and mm_gate_expansion.
    """
    wanted = bind_names(depth_of(state), LEGACY in state)
    require(state, wanted, WHAT)
    refuse_unknown((name for name in state if our_name(name) and name not in wanted), WHAT)
    width, inner = config["hidden_size"], config["hidden_size"] * config["mm_gate_expansion"]
    shapes = {"proj": (width, config["mm_hidden_size"]), "norm": (width,), "f2": (width, inner)}
    shapes = with_biases(shapes | dict.fromkeys(("f1", "f3"), (inner, width)))
    named = {name: shapes[re.sub(r"image_bind_|_\d+(?=\.)", "", name)] for name in wanted}
    check_connector(state, named, width, WHAT)


def config_from(params: Mapping, state: Mapping, **options) -> dict:
    """Return the fields of our config for a base's params.json and a checkpoint.

    options: config keys that weights do not tell, such as vision_config, and vocab_size where params.json says -1
    (default 32000 without embeddings). Raises ValueError with both numbers for a base of another width, number of
    heads or layers, or vocabulary.
    """
    state = get_state(state)
    base = base_fields(params, state.get(f"{LLAMA}tok_embeddings.weight"), options.pop("vocab_size", None))
    require(state, [TABLE, "image_bind_proj.weight", "image_bind_f1_1.weight"], WHAT)
    told = {
        "mm_projector_type": f"gated_mlp{depth_of(state)}x",
        "mm_hidden_size": state["image_bind_proj.weight"].shape[1],
        "mm_gate_expansion": len(state["image_bind_f1_1.weight"]) // base["hidden_size"],
        "mm_gate_norm": "layer" if LEGACY in state else "rms",
    }
    check_bind(state, base | told)
    told |= prompt_fields(state[TABLE], 1, base, WHAT)
    told |= inspect_llama(without_prefix(state, LLAMA), base, WHAT)
    return resolve({**base, **DEFAULTS}, told, options)


def weights_from(state: Mapping, config) -> dict[str, torch.Tensor]:
    """Return a checkpoint's weights under our names, views where possible; the base and ImageBind if it holds them.

    Raises ValueError for a name that is not known or missing, and for a shape that is not that of the config.
    """
    state, config = get_state(state), get_fields(config)
    known = (LLAMA, ENCODER, TABLE, *DROPPED)
    refuse_unknown((name for name in state if not name.startswith(known) and our_name(name) is None), WHAT)
    check_bind(state, config)
    weights = llama_from(state, config, WHAT)
    weights |= {our_name(name): tensor for name, tensor in state.items() if our_name(name)}
    weights |= prompts_from(state, config, TABLE, WHAT)
    return weights | {f"{TOWER}{name}": tensor for name, tensor in without_prefix(state, ENCODER).items()}


def weights_to(state: Mapping, config) -> dict[str, torch.Tensor]:
    """Return our weights in the layout of a release, without base and ImageBind; see `write_release`."""
    config = get_fields(config)
    depth = int(re.fullmatch(r"gated_mlp(\d+)x", config["mm_projector_type"])[1])
    connector = {name: our_name(name) for name in bind_names(depth, config["mm_gate_norm"] == "layer")}
    return write_release(state, config, TABLE, connector)


def peer_name(name: str, config=None) -> str:
    """Return the original's name of one of our weights; ValueError if it has none."""
    [plain] = plain_weights({name: None})
    if plain.startswith(TOWER):
        return ENCODER + plain.removeprefix(TOWER)
    found = TABLE if plain == PROMPTS else llama_peer_name(plain) or original_name(plain)
    if found is None:
        raise ValueError(f"ImageBind-LLM has no weight for {name!r}.")
    return found
