"""Turn MoE-LLaVA's weight and config names into ours and back.

MoE-LLaVA (https://github.com/PKU-YuanGroup/MoE-LLaVA) keeps each expert as an MLP of its own inside DeepSpeed's layer,
`mlp.deepspeed_moe.experts.deepspeed_experts.{e}`, and the router as `mlp.deepspeed_moe.gate.wg`. Here the experts of a
layer are fused: `mlp.experts.gate_up_proj` [E, 2I, D] and `down_proj` [E, D, I]; for Phi `up_proj` [E, I, D],
`down_proj` and both biases. Whatever is not named below has the same name in both.
"""

import re
from collections.abc import Iterable, Mapping

import torch

from llava_lite.formats.llava import plain_name

ROUTER = ("mlp.gate.weight", "mlp.deepspeed_moe.gate.wg.weight")
EXPERT = "mlp.deepspeed_moe.experts.deepspeed_experts."
PREFIXES = (
    ("model.mm_projector.", "model.mm_projector.image_spatial_proj."),
    ("model.vision_tower.vision_tower.", "model.image_tower.image_tower."),
)
# Our fused weight: the linear layers of an expert that it holds, side by side; of gated experts and of Phi's.
GATED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
PLAIN = {"up_proj": ("fc1",), "down_proj": ("fc2",)}
CONFIG_KEYS = {"mm_image_tower": "mm_vision_tower", "image_projector_type": "mm_projector_type"}
VIDEO_KEYS = (
    "mm_video_tower",
    "video_projector_type",
    "video_global_proj",
    "video_temproal_proj",  # as it is spelled there
    "video_spatial_proj",
)
STABLELM_KEYS = {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"}
# The decoders that it trains, and ours where the name differs.
DECODERS = {"qwen1_5": "qwen2"}
REFUSED = {
    "qwen": "Qwen's first generation has a decoder that transformers does not hold, only code beside its weights that "
    "would run on opening. Use a checkpoint on Qwen1.5 (moe_llava_qwen1_5) or train on Qwen2.",
    "minicpm": "MiniCPM's decoder is not in transformers, only code beside its weights that would run on opening. Use "
    "a checkpoint on Phi, StableLM, Qwen1.5, Mistral or Llama.",
}

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_OUR_EXPERTS = re.compile(r"(?P<layer>.*\.)mlp\.experts\.(?P<fused>gate_up_proj|up_proj|down_proj)(?P<bias>_bias)?")
_THEIR_EXPERTS = re.compile(
    rf"(?P<layer>.*\.){re.escape(EXPERT)}(?P<expert>\d+)\.(?P<linear>\w+)\.(?P<kind>weight|bias)"
)


def moe_llava_names(name, num_experts=1, gated=None):
    """Return MoE-LLaVA's names for the parameter that is `name` here: one, or one for each expert and linear layer.

    These are the names that --train_modules is written in. gated: whether the experts have a gate_proj; None, not
    known, names `down_proj` both ways, down_proj and fc2.
    """
    match = _OUR_EXPERTS.fullmatch(name)
    if match is None:
        return [_replace_prefix(name.replace(*ROUTER), 0, 1)]
    kinds = [GATED, PLAIN] if gated is None else [GATED if gated else PLAIN]
    linears = [linear for kind in kinds for linear in kind.get(match["fused"], ())]
    suffix = "bias" if match["bias"] else "weight"
    return [
        f"{match['layer']}{EXPERT}{expert}.{linear}.{suffix}" for expert in range(num_experts) for linear in linears
    ]


def get_layer(name):
    """Return the layer that a parameter of this name belongs to, None for one outside the layers."""
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


def match_train_modules(
    names: Iterable[str], entries: Iterable[str] | None, num_experts: Mapping[int, int]
) -> list[str]:
    """Return those of our parameter `names` whose name in MoE-LLaVA contains one of `entries`; None: all MLPs.

    num_experts: experts by layer index. Raises ValueError for an entry that is part of no name, and for entries that
    take a part of a fused weight only.
    """
    names = list(names)
    if entries is None:
        return [name for name in names if ".mlp." in name]
    gated = any(name.endswith(".mlp.experts.gate_up_proj") for name in names)
    theirs = {name: moe_llava_names(name, num_experts.get(get_layer(name), 1), gated) for name in names}
    for entry in entries:
        if not any(entry in alias for aliases in theirs.values() for alias in aliases):
            known = sorted({alias.split(".")[-2] for aliases in theirs.values() for alias in aliases})
            raise ValueError(
                f"--train_modules {entry} trains nothing: no parameter is named so; known: {', '.join(known)}."
            )
    return [name for name, aliases in theirs.items() if takes_all(name, aliases, list(entries))]


def takes_all(name, aliases, entries):
    """Whether `entries` match every one of `aliases`, False if they match none; raises ValueError for some."""
    matched = [alias for alias in aliases if any(entry in alias for entry in entries)]
    if matched and len(matched) < len(aliases):
        missed = next(alias for alias in aliases if alias not in matched)
        raise ValueError(
            f"--train_modules {' '.join(entries)} names {matched[0]} but not {missed}, and {name} holds both as one "
            "weight. Name both or neither."
        )
    return bool(matched)


def _replace_prefix(name, ours, theirs):
    """Replace a prefix of PREFIXES from one column by that of the other."""
    for pair in PREFIXES:
        if name.startswith(pair[ours]) and not (theirs and name.startswith(pair[theirs])):
            return pair[theirs] + name.removeprefix(pair[ours])
    return name


def to_moe_llava(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state dict under MoE-LLaVA's names, fused experts taken apart (views of the same memory)."""
    gated = any(name.endswith("mlp.experts.gate_up_proj") for name in state_dict)
    renamed = {}
    for name, tensor in state_dict.items():
        names, parts = moe_llava_names(name), [tensor]
        if _OUR_EXPERTS.fullmatch(name):
            num_linears = len(moe_llava_names(name, gated=gated))
            names = moe_llava_names(name, len(tensor), gated)
            parts = [part for expert in tensor.unbind(0) for part in expert.chunk(num_linears)]
        renamed |= zip(names, parts, strict=True)
    return renamed


def from_moe_llava(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state dict under our names, each layer's experts fused; a dict under our names passes unchanged.

    Raises ValueError if a layer lacks one of its experts' weights.
    """
    experts, renamed = {}, {}
    for name, tensor in state_dict.items():
        match = _THEIR_EXPERTS.fullmatch(name)
        if match:
            experts.setdefault(match["layer"], {})[match["linear"], match["kind"], int(match["expert"])] = tensor
        else:
            renamed[_replace_prefix(name.replace(*reversed(ROUTER)), 1, 0)] = tensor
    for layer, weights in experts.items():
        renamed |= {f"{layer}mlp.experts.{name}": tensor for name, tensor in fuse_experts(layer, weights).items()}
    return renamed


def fuse_experts(layer, weights):
    """Return our tensors of one layer from its experts' weights, a dict (linear, weight or bias, expert) -> tensor."""
    fusion = GATED if any(linear == "gate_proj" for linear, _, _ in weights) else PLAIN
    kinds = sorted({kind for _, kind, _ in weights}, reverse=True)  # weight, bias
    num_experts = 1 + max(expert for _, _, expert in weights)
    linears = [linear for parts in fusion.values() for linear in parts]
    wanted = {(linear, kind, e) for linear in linears for kind in kinds for e in range(num_experts)}
    if wanted != set(weights):
        missing, unknown = sorted(wanted - set(weights)), sorted(set(weights) - wanted)
        raise ValueError(
            f"the experts of {layer}mlp are incomplete: missing {missing[:4]}, not known {unknown[:4]}. "
            "A checkpoint written under expert parallelism holds one rank's experts only; gather all ranks' files."
        )
    return {
        name + ("_bias" if kind == "bias" else ""): torch.stack(
            [torch.cat([weights[linear, kind, e] for linear in parts]) for e in range(num_experts)]
        )
        for name, parts in fusion.items()
        for kind in kinds
    }


def claims(config: Mapping) -> bool:
    """Tell a checkpoint of MoE-LLaVA, dense or with experts, by its model_type or by keys that only it has."""
    model_type = config.get("model_type") or ""
    return (
        model_type.startswith("moe_llava_")
        or model_type in ("llava_qwen1_5", "llava_minicpm")
        or (model_type == "llava_qwen" and "kv_channels" in config)
        or any(key in config for key in (*CONFIG_KEYS, *VIDEO_KEYS))
    )


def config_from(config: Mapping) -> dict:
    """Return the fields of a config.json under our names; those under our names already stay, and count more.

    mm_image_tower is mm_vision_tower here, model_type moe_llava_llama is llava_llama: whether a model has experts is
    told by the field `moe` alone; `patch` of a SigLIP tower is drop_first. Raises ValueError for what this package
    cannot run: Qwen's first generation, MiniCPM, a video tower.
    """
    model_type = config.get("model_type") or ""
    decoder = model_type.removeprefix("moe_").removeprefix("llava_")
    if decoder in REFUSED:
        raise ValueError(f"MoE-LLaVA's model type {model_type!r} cannot be opened: {REFUSED[decoder]}")
    if config.get("mm_video_tower") is not None:
        raise ValueError(
            f"this checkpoint has a video tower, {config['mm_video_tower']!r}; videos are not supported here, only "
            "MoE-LLaVA's models of images."
        )
    renamed = {CONFIG_KEYS.get(key, key): value for key, value in config.items() if CONFIG_KEYS.get(key) not in config}
    renamed = {key: value for key, value in renamed.items() if key not in VIDEO_KEYS}
    if decoder != model_type:
        renamed["model_type"] = f"llava_{DECODERS.get(decoder, decoder)}"
    return renamed | _select_feature(renamed) | (_stablelm_fields(renamed) if decoder == "stablelm" else {})


def _select_feature(config):
    """Return the field that says which of the tower's tokens are read, if it has another meaning here.

    There "patch" leaves the first token out whatever it is. SigLIP's is a patch: its models were trained with 728
    features of 729.
    """
    tower = str(config.get("mm_vision_tower") or "").lower()
    is_siglip = tower.startswith("google/") or "siglip" in tower
    reads_patches = config.get("mm_vision_select_feature", "patch") == "patch"
    return {"mm_vision_select_feature": "drop_first"} if is_siglip and reads_patches else {}


def _stablelm_fields(config):
    """Return the fields of transformers' StableLM for those of its code from before, and that code's defaults."""
    fields = {ours: config[theirs] for theirs, ours in STABLELM_KEYS.items() if theirs in config}
    return {"use_qkv_bias": config.get("use_qkv_bias", True), **fields}


def weights_from(state_dict: Mapping[str, torch.Tensor], config: Mapping) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint under our names: LoRA added in, each layer's experts fused.

    Phi's vocabulary head has a bias here and none in MoE-LLaVA, which drops it: it is 0 then.
    """
    plain = {plain_name(name): tensor for name, tensor in state_dict.items()}
    weights = from_moe_llava(merge_lora(plain, config.get("lora")))
    head = weights.get("lm_head.weight")
    if (config.get("model_type") or "").endswith("llava_phi") and head is not None:
        weights.setdefault("lm_head.bias", torch.zeros(len(head), dtype=head.dtype))
    return weights


def merge_lora(state_dict: Mapping[str, torch.Tensor], lora: Mapping | None) -> dict[str, torch.Tensor]:
    """Return the state dict with every `x.lora_A`, `x.lora_B` added to `x.weight`: W + lora_alpha / r * B A.

    MoE-LLaVA writes a tuned model with experts so, LoRA beside the weights. lora: the field `lora` of config.json.
    Raises ValueError if that field is absent or a pair is incomplete.
    """
    downs = {name.split(".lora_A.")[0]: tensor for name, tensor in state_dict.items() if ".lora_A." in name}
    ups = {name.split(".lora_B.")[0]: tensor for name, tensor in state_dict.items() if ".lora_B." in name}
    plain = {name: tensor for name, tensor in state_dict.items() if ".lora_" not in name}
    if not downs and not ups:
        return plain
    if not lora or "lora_alpha" not in lora:
        raise ValueError(
            f"the checkpoint holds LoRA weights of {len(downs)} layers, such as {sorted(downs)[:2]}, and its "
            "config.json does not hold their scale: it lacks the field lora with lora_alpha, as in "
            '{"lora_enable": true, "lora_r": 128, "lora_alpha": 256}.'
        )
    incomplete = sorted(set(downs) ^ set(ups)) + [name for name in downs if f"{name}.weight" not in plain]
    if incomplete:
        raise ValueError(f"LoRA of {incomplete[:4]} is incomplete: lora_A, lora_B and the weight itself are needed.")
    for name, down in downs.items():
        weight = plain[f"{name}.weight"]
        update = ups[name].float() @ down.float()
        plain[f"{name}.weight"] = (weight.float() + lora["lora_alpha"] / len(down) * update).to(weight.dtype)
    return plain
