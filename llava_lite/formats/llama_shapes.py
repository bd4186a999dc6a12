"""Compare the shapes of a Llama's weights, and of what adapters add to it, with the config of their base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from llava_lite.formats.meta_llama import ANOTHER_BASE, LINEARS

_LAYER = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+?)(?:\.(.+))?")
_ANY_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def linear_shapes(config: Mapping) -> dict[str, tuple[int, int]]:
    """Return {linear layer: (rows, columns)} of a decoder with this config."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    queries = head * config["num_attention_heads"]
    keys = head * (config.get("num_key_value_heads") or config["num_attention_heads"])
    return {
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
    }


def expected_shape(name: str, config: Mapping, rank: int | None = None) -> tuple[int, ...] | None:
    """Return the shape of one of our weights in a model with this config, None for one that is not of a Llama.

    rank: of LoRA.
    """
    width, num_prompts = config["hidden_size"], (config.get("adaption_prompt_len") or 0) * num_prompted(config)
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return config["vocab_size"], width
    is_norm = name.startswith("model.layers.") and name.endswith("layernorm.weight")
    if is_norm or name in ("model.norm.weight", "model.image_start", "model.image_end"):
        return (width,)
    if name == "model.adaption_prompt.query":
        return num_prompts, width
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    _, linear, kind = match.groups()
    if linear in ("adaption_gate", "adaption_new_gate"):
        return (config["num_attention_heads"] if linear == "adaption_gate" else 1,)
    rows, columns = linear_shapes(config)[linear]
    return {
        "weight": (rows, columns),
        "bias": (rows,),
        "lora_A.weight": (rank, columns),
        "lora_B.weight": (rows, rank),
    }[kind]


def num_prompted(config: Mapping) -> int:
    """Return the number of layers with prompts, the last of the model; 0 for images as tokens."""
    if config.get("mm_injection") != "adaption_prompt":
        return 0
    layers = config.get("adaption_prompt_layers")
    return config["num_hidden_layers"] if layers is None else layers


def prompted_layers(config: Mapping) -> range:
    """Return the indices of the layers with prompts."""
    return range(config["num_hidden_layers"] - num_prompted(config), config["num_hidden_layers"])


def check_shapes(weights: Mapping, config: Mapping, what: str) -> None:
    """Raise ValueError with both numbers for weights of another width, number of heads or layers, or vocabulary.

    what: names the weights in the message.
    """
    rank = lora_rank(weights)
    for name, tensor in weights.items():
        expected = expected_shape(name, config, rank)
        if expected is not None and tuple(tensor.shape) != expected:
            raise ValueError(
                f"{what}: {name} has shape {tuple(tensor.shape)} and the base, with hidden_size "
                f"{config['hidden_size']}, {config['num_attention_heads']} heads and a vocabulary of "
                f"{config['vocab_size']}, expects {expected}. {ANOTHER_BASE}"
            )
    layers = {int(match[1]) for match in map(_ANY_LAYER.match, weights) if match}
    num_layers = config["num_hidden_layers"]
    if layers and max(layers) + 1 != num_layers:
        raise ValueError(f"{what}: they are of {max(layers) + 1} layers and the base has {num_layers}. {ANOTHER_BASE}")


def with_biases(modules: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of the weights and biases of modules {name: shape of its weight}."""
    sizes = {"weight": 2, "bias": 1}
    return {f"{module}.{kind}": shape[:size] for module, shape in modules.items() for kind, size in sizes.items()}


def check_connector(state: Mapping, shapes: Mapping[str, tuple[int, ...]], width: int, what: str) -> None:
    """Raise ValueError with both shapes for a weight of a connector to a base of this width that has another shape."""
    for name, expected in shapes.items():
        if tuple(state[name].shape) != expected:
            raise ValueError(
                f"{what}: {name} has shape {tuple(state[name].shape)}, and {expected} is expected with a base of "
                f"width {width}. It belongs to another base."
            )


def lora_rank(weights: Mapping) -> int | None:
    """Return the rank of the LoRA among our weights, None if there is none."""
    return next((len(tensor) for name, tensor in weights.items() if name.endswith("lora_A.weight")), None)


def biased_linears(names: Iterable[str]) -> list[str]:
    """Return the linear layers with a bias among our names, as config key decoder_bias lists them."""
    return _linears_with(names, "bias")


def _linears_with(names: Iterable[str], kind: str) -> list[str]:
    found = {match[2] for match in map(_LAYER.fullmatch, names) if match and match[3] == kind}
    return [linear for linear in (ours.split(".")[1] for ours in LINEARS.values()) if linear in found]


def lora_fields(weights: Mapping) -> dict | None:
    """Return the keywords of PEFT's LoraConfig for the LoRA among our weights, None if there is none.

    In all of these systems the product of the halves is added as it is: lora_alpha is the rank.
    """
    rank = lora_rank(weights)
    if rank is None:
        return None
    targets = _linears_with(weights, "lora_A.weight")
    return {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "target_modules": targets}
