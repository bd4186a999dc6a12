"""Turn a Qwen3 decoder with experts into transformers' text model `qwen3_moe` and back: config fields and weights.

There every layer outside mlp_only_layers has num_experts experts. Each is an MLP of its own in the files,
`mlp.experts.{e}.gate_proj.weight`, as in Qwen's releases; transformers 5 fuses them when it opens the files, and vLLM
reads no other names. A token's weights are the probabilities of its num_experts_per_tok experts, scaled to sum 1 with
norm_topk_prob. Here they are scaled where there are two experts or more, and a single one has its probability.
"""

import re
from collections.abc import Mapping

import torch
from transformers import CONFIG_MAPPING

from llava_lite.formats.moe_llava import GATED, fuse_experts

DECODER = "qwen3_moe"
_OUR_EXPERTS = re.compile(r"(?P<layer>.*\.mlp\.experts)\.(?P<fused>gate_up_proj|down_proj)")
_THEIR_EXPERTS = re.compile(r"(?P<layer>.*\.)mlp\.experts\.(?P<expert>\d+)\.(?P<linear>\w+)\.(?P<kind>weight|bias)")


def has_experts(config: Mapping) -> bool:
    """Tell whether our config describes a model with experts."""
    moe = config.get("moe")
    return bool(moe) and moe.get("moe_enable", True)


def refusal(config: Mapping) -> str | None:
    """Return why qwen3_moe cannot express the experts of a model, every reason with its values; None if it can.

    config: the fields of our config, with `moe` as MoeConfig.to_dict writes it out.
    """
    decoder, moe = config["model_type"].removeprefix("llava_"), config["moe"]
    if decoder != "qwen3":
        return (
            f"transformers has a text model that routes as this package does for Qwen3 alone ({DECODER}); this model "
            f"has experts (config.moe) in a decoder {decoder!r}."
        )
    counts, top_k = moe["num_experts"], moe["top_k_experts"]
    reasons = []
    if len(set(counts)) > 1:
        reasons.append(f"num_experts is {counts} in layers {moe['moe_layers_idx']}, and it has one number for all")
    if moe["use_residual"]:
        reasons.append("use_residual is True, and it has no dense MLP beside its experts")
    # With a factor of E / K an expert has room for every token.
    if moe["moe_drop_tokens"] and moe["eval_capacity_factor"] * top_k < max(counts):
        reasons.append(
            f"moe_drop_tokens is True with eval_capacity_factor {moe['eval_capacity_factor']:g}, and it drops no "
            f"token ({max(counts) / top_k:g} and more drop none of {max(counts)} experts, {top_k} a token)"
        )
    if moe["moe_second_expert_sampling"] == "always":
        reasons.append("moe_second_expert_sampling is 'always', and it draws no expert")
    kinds = set(config.get("layer_types") or [])
    if len(kinds) > 1:
        first = config["layer_types"].index("sliding_attention")
        reasons.append(f"layers from {first} on alone have a sliding window, and it has one for all layers or none")
    return f"transformers' {DECODER} cannot express this model: {'; '.join(reasons)}." if reasons else None


def fields_to(config: Mapping) -> dict:
    """Return the fields that text_config needs beside those of a dense Qwen3."""
    moe = config["moe"]
    return {
        # Qwen3MoeConfig does not list it, and its model reads it.
        "head_dim": config["head_dim"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(set(range(config["num_hidden_layers"])) - set(moe["moe_layers_idx"])),
        "num_experts": moe["num_experts"][0],
        "num_experts_per_tok": moe["top_k_experts"],
        "norm_topk_prob": moe["top_k_experts"] > 1,
        "moe_intermediate_size": config["intermediate_size"],
    }


def fields_from(text: Mapping, recorded: Mapping | None) -> dict:
    """Return the fields of our config for a text_config; ValueError for experts that this package has not.

    recorded: our config.moe where `convert` wrote the directory. What text_config says counts more; what it has no
    place for (capacity, the balance loss of a further stage) is taken from it, else from our defaults.
    """
    theirs = CONFIG_MAPPING[DECODER].from_dict(dict(text)).to_dict()
    known = CONFIG_MAPPING["qwen3"]().to_dict().keys() & theirs.keys() - {"layer_types", "max_window_layers"}
    fields = {key: theirs[key] for key in known}
    fields["head_dim"] = theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"]
    if theirs["sliding_window"] is not None:
        fields["max_window_layers"] = 0
    num_experts, top_k = theirs["num_local_experts"], theirs["num_experts_per_tok"]
    layers = [
        layer
        for layer in range(theirs["num_hidden_layers"])
        if layer not in theirs["mlp_only_layers"]
        and num_experts > 0
        and (layer + 1) % theirs["decoder_sparse_step"] == 0
    ]
    if not layers:
        return fields
    if theirs["norm_topk_prob"] != (top_k > 1):
        raise ValueError(
            f"text_config has norm_topk_prob {theirs['norm_topk_prob']} and num_experts_per_tok {top_k}; here the "
            "weights of two experts and more sum to 1, and the weight of a single one is its probability."
        )
    width, dense_width = theirs["moe_intermediate_size"], theirs["intermediate_size"]
    if width != dense_width and len(layers) < theirs["num_hidden_layers"]:
        raise ValueError(
            f"text_config has experts of width {width} (moe_intermediate_size) and dense layers of width "
            f"{dense_width} (intermediate_size); here an expert is as wide as a dense MLP."
        )
    fields["intermediate_size"] = width
    moe = {"moe_enable": True, "moe_mode": "custom"} | dict(recorded or {})
    moe |= {"moe_layers_idx": layers, "num_experts": [num_experts] * len(layers), "top_k_experts": top_k}
    return fields | {"moe": moe}


def split_experts(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights with each expert under names of its own, views of the same memory."""
    split = {}
    for name, tensor in state_dict.items():
        match = _OUR_EXPERTS.fullmatch(name)
        if match is None:
            split[name] = tensor
            continue
        linears = GATED[match["fused"]]
        for expert, weight in enumerate(tensor.unbind(0)):
            for linear, part in zip(linears, weight.chunk(len(linears)), strict=True):
                split[f"{match['layer']}.{expert}.{linear}.weight"] = part
    return split


def join_experts(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights with each layer's experts fused; fused ones pass unchanged.

    Raises ValueError if a layer lacks one of its experts' weights.
    """
    experts, joined = {}, {}
    for name, tensor in state_dict.items():
        match = _THEIR_EXPERTS.fullmatch(name)
        if match:
            experts.setdefault(match["layer"], {})[match["linear"], match["kind"], int(match["expert"])] = tensor
        else:
            joined[name] = tensor
    for layer, weights in experts.items():
        joined |= {f"{layer}mlp.experts.{name}": tensor for name, tensor in fuse_experts(layer, weights).items()}
    return joined
