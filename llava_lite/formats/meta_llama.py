"""Turn LLaMA checkpoints of Meta's own layout (consolidated.NN.pth, params.json) into transformers' Llama and back.

Touvron et al. 2023, arXiv 2302.13971 and 2307.09288. Meta rotates neighbouring dimensions of a head, (0, 1), (2, 3)
and so on; transformers rotates (0, d/2), (1, d/2 + 1) and so on. So the rows of wq and wk change their order, and
those of their biases and of the B half of their LoRA. What LLaMA-Adapter V2, ImageBind-LLM and LLaMA2-Accessory add
inside the layers (biases, LoRA, gates) is read here too. H heads, d width of a head, D model width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

import torch
from einops import rearrange

# Meta's linear layer -> transformers'.
LINEARS = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
NORMS = {"attention_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight"}
GATES = {"attention.gate": "self_attn.adaption_gate", "attention.new_gate": "self_attn.adaption_new_gate"}
OUTSIDE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# The A and B halves of a linear layer's LoRA, as its block and its own name spell them.
LORA = {
    "llama_adapter": ("{block}.lora_{linear}_l1.weight", "{block}.lora_{linear}_l2.weight"),
    "accessory": ("{block}.{linear}.lora_a.weight", "{block}.{linear}.lora_b.weight"),
}
# Tables of rotary frequencies, which transformers computes.
DROPPED = "rope.freqs"
# Keys of params.json that shape the model; the others are settings of a run or of what an adapter adds.
PARAMS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps")
PARAMS += ("rope_theta", "rope_scaling", "use_scaled_rope", "max_seq_len")
WITHOUT_EFFECT = {"max_batch_size", "w_bias", "w_lora", "lora_rank", "w_new_gate", "bias_tuning", "norm_tuning"}
WITHOUT_EFFECT |= {"prefix_len", "prefix_layers", "use_prefix_new_gate", "trainable_mode", "use_flash_attn"}
WITHOUT_EFFECT |= {"v_embed_dim", "v_depth", "v_num_heads", "v_mlp_ratio", "load_pretrained_visual_encoder"}

ANOTHER_BASE = "It belongs to another base; give the params.json, or the base, that it was trained with."

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


@lru_cache
def layer_names(spelling: str) -> dict[str, str]:
    """Return {Meta's name of a weight inside a layer: ours}, LoRA in a spelling of LORA."""
    names = NORMS | GATES
    for theirs, ours in LINEARS.items():
        block, linear = theirs.split(".")
        halves = [pattern.format(block=block, linear=linear) for pattern in LORA[spelling]]
        names |= {f"{theirs}.weight": f"{ours}.weight", f"{theirs}.bias": f"{ours}.bias"}
        names |= {halves[0]: f"{ours}.lora_A.weight", halves[1]: f"{ours}.lora_B.weight"}
    return names


def our_name(name: str) -> str | None:
    """Return transformers' name of one of Meta's weights, None for a name that is not of the layout."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return OUTSIDE.get(name)
    ours = (layer_names("llama_adapter") | layer_names("accessory")).get(match[2])
    return None if ours is None else f"model.layers.{match[1]}.{ours}"


def meta_name(name: str, spelling: str = "llama_adapter") -> str | None:
    """Return Meta's name of one of transformers' weights, None for a name that the layout lacks."""
    match = _LAYER.fullmatch(name.removeprefix("model."))
    if match is None:
        return {ours: theirs for theirs, ours in OUTSIDE.items()}.get(name)
    theirs = {ours: theirs for theirs, ours in layer_names(spelling).items()}.get(match[2])
    return None if theirs is None else f"layers.{match[1]}.{theirs}"


def config_from_params(params: Mapping, vocab_size: int | None = None) -> dict:
    """Return the fields of transformers' LlamaConfig for Meta's params.json.

    vocab_size: of the tokenizer or of the embeddings, for params that say -1. Raises ValueError for a key that is not
    known, for one that is absent, and for two different vocabulary sizes.
    """
    unknown = sorted(set(params) - set(PARAMS) - WITHOUT_EFFECT)
    absent = [key for key in ("dim", "n_layers", "n_heads") if key not in params]
    if unknown or absent:
        raise ValueError(
            f"params.json has keys that are not known here, {unknown}, and lacks {absent}. Give the params.json that "
            "came with the consolidated.*.pth files."
        )
    if params.get("use_scaled_rope"):
        raise ValueError(
            "params.json has use_scaled_rope, Llama 3.1's rotary scaling, whose factor it does not state. Open the "
            "model's Hugging Face repository instead, whose config.json states it."
        )
    fields = {
        "model_type": "llama",
        "vocab_size": _vocab_size(params, vocab_size),
        "hidden_size": params["dim"],
        "intermediate_size": intermediate_size(params),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": float(params.get("rope_theta") or 10000.0),
        "max_position_embeddings": params.get("max_seq_len", 2048),
        "tie_word_embeddings": False,
    }
    if params.get("rope_scaling") is not None:
        # Accessory multiplies positions by this number; transformers divides them by a factor.
        fields["rope_scaling"] = {"rope_type": "linear", "factor": 1 / params["rope_scaling"]}
    return fields


def intermediate_size(params: Mapping) -> int:
    """Return the width of an MLP: two thirds of 4 D, times ffn_dim_multiplier, rounded up to multiple_of."""
    width = int(2 * 4 * params["dim"] / 3)
    if params.get("ffn_dim_multiplier") is not None:
        width = int(params["ffn_dim_multiplier"] * width)
    multiple = params.get("multiple_of", 256)
    return multiple * -(-width // multiple)


def _vocab_size(params, vocab_size):
    stated = params.get("vocab_size", -1)
    if stated is None or stated < 0:
        if vocab_size is None or vocab_size < 0:
            raise ValueError("params.json has vocab_size -1, to be taken from the tokenizer; give vocab_size=.")
        return vocab_size
    if vocab_size not in (None, -1, stated):
        raise ValueError(
            f"params.json has a vocabulary of {stated}, the tokenizer or the embeddings have {vocab_size}. They "
            "belong to different models; give those of one."
        )
    return stated


def weights_from(
    state: Mapping[str, torch.Tensor], num_heads: int, num_key_value_heads: int | None = None, prefix: str = ""
) -> dict[str, torch.Tensor]:
    """Return the weights under transformers' names; views, but for what the rotary order changes.

    state: a model, or what an adapter trained alone: norms, biases, LoRA, gates. prefix: only names that begin so are
    read, such as "llama." of an adapter's file. Gates [1, H, 1, 1] become [H]. Raises ValueError for a name
    that is not known, for weights that some layers have and others lack, for a model that is incomplete, and for
    another number of heads.
    """
    heads = {"q_proj": num_heads, "k_proj": num_key_value_heads or num_heads, "adaption_gate": num_heads}
    named = {
        name: (our_name(name.removeprefix(prefix)), tensor)
        for name, tensor in state.items()
        if name.startswith(prefix) and not name.endswith(DROPPED)
    }
    unknown = [name for name, (ours, _) in named.items() if ours is None]
    if unknown:
        raise ValueError(
            f"{len(unknown)} weights are not of Meta's LLaMA layout, such as {unknown[:4]}. If they are of another "
            "system, open the checkpoint as one of that."
        )
    weights = {ours: _as_ours(name, ours, tensor, heads) for name, (ours, tensor) in named.items()}
    check_complete(weights, prefix)
    _check_head_widths(weights, heads)
    return weights


def weights_to(
    weights: Mapping[str, torch.Tensor],
    num_heads: int,
    num_key_value_heads: int | None = None,
    prefix: str = "",
    spelling: str = "llama_adapter",
) -> dict[str, torch.Tensor]:
    """Return the weights under Meta's names with `prefix`, the inverse of `weights_from`, bit for bit.

    spelling: of LoRA, a key of LORA. Raises ValueError for a name that the layout lacks.
    """
    heads = {"q_proj": num_heads, "k_proj": num_key_value_heads or num_heads}
    named = {name: meta_name(name, spelling) for name in weights}
    unknown = [name for name, theirs in named.items() if theirs is None]
    if unknown:
        raise ValueError(f"Meta's LLaMA layout has no place for {unknown[:4]} ({len(unknown)} in all).")
    return {f"{prefix}{theirs}": _as_theirs(name, weights[name], heads) for name, theirs in named.items()}


def to_halves(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return rows [H*d, ...] in transformers' order: of each head the even ones first, then the odd ones."""
    return rearrange(rows, "(heads half pair) ... -> (heads pair half) ...", heads=num_heads, pair=2)


def to_pairs(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return rows [H*d, ...] in Meta's order, the inverse of `to_halves`."""
    return rearrange(rows, "(heads pair half) ... -> (heads half pair) ...", heads=num_heads, pair=2)


def linear_of(name: str) -> str:
    """Return the last module of a weight's name: "q_proj" of ...self_attn.q_proj.lora_B.weight, "adaption_gate"."""
    parts = [part for part in name.split(".") if part not in ("weight", "bias", "lora_A", "lora_B")]
    return parts[-1]


def is_rotary(name: str) -> bool:
    """Tell whether the order of rows of one of our weights is that of the rotary embedding."""
    return linear_of(name) in ("q_proj", "k_proj") and not name.endswith("lora_A.weight")


def _as_ours(name, ours, tensor, heads):
    num_heads = heads.get(linear_of(ours))
    if ours.endswith("adaption_new_gate"):
        return tensor.reshape(1)
    if ours.endswith("adaption_gate"):
        if tensor.numel() != num_heads:
            raise ValueError(f"{name} is of {tensor.numel()} heads and the base has {num_heads}. {ANOTHER_BASE}")
        return tensor.reshape(-1)
    if not is_rotary(ours):
        return tensor
    if len(tensor) % (2 * num_heads):
        raise ValueError(
            f"{name} has {len(tensor)} rows, which are not {num_heads} heads of an even width. {ANOTHER_BASE}"
        )
    return to_halves(tensor, num_heads)


def _as_theirs(name, tensor, heads):
    if name.endswith(("adaption_gate", "adaption_new_gate")):
        return tensor.reshape(1, -1, 1, 1)
    return to_pairs(tensor, heads[linear_of(name)]) if is_rotary(name) else tensor


def _check_head_widths(weights, heads):
    """Raise ValueError unless a head of wk is as wide as one of wq; else wk would be reordered by a wrong width."""
    for name in weights:
        key = name.replace("q_proj", "k_proj")
        if not is_rotary(name) or key == name or key not in weights:
            continue
        rows, key_rows, width = len(weights[name]), len(weights[key]), len(weights[name]) // heads["q_proj"]
        if key_rows != width * heads["k_proj"]:
            raise ValueError(
                f"wq has {rows} rows, {heads['q_proj']} heads of {width}; wk has {key_rows}, which are not "
                f"{heads['k_proj']} heads of {width} but {key_rows / width:g}. Give n_kv_heads as params.json has it."
            )


def check_complete(names: Iterable[str], prefix: str = "") -> None:
    """Raise ValueError, under Meta's names, for weights that should be beside `names` (ours) and are not.

    A model has all its weights; an adapter has each of its parts in every layer, and both halves of LoRA.
    """
    names = set(names)
    layers = {int(_LAYER.match(name.removeprefix("model."))[1]) for name in names if ".layers." in name}
    kinds = {_LAYER.fullmatch(name.removeprefix("model."))[2] for name in names if ".layers." in name}
    outside = {name for name in names if ".layers." not in name}
    matrices = {f"{ours}.weight" for ours in LINEARS.values()}
    if kinds & matrices or outside - {"model.norm.weight"}:
        kinds, outside = kinds | matrices, set(OUTSIDE.values())
    if kinds & set(NORMS.values()) or "model.norm.weight" in outside:
        kinds, outside = kinds | set(NORMS.values()), outside | {"model.norm.weight"}
    for half, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
        kinds = kinds | {kind.replace(half, other) for kind in kinds}
    wanted = {f"model.layers.{layer}.{kind}" for layer in range(max(layers, default=0) + 1) for kind in kinds}
    missing = sorted(f"{prefix}{meta_name(name)}" for name in (wanted | outside) - names)
    if missing:
        raise ValueError(
            f"the LLaMA weights are incomplete: {len(missing)} are missing, such as {missing[:4]}. Give all files of "
            "the checkpoint."
        )
