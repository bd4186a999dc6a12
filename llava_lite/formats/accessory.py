"""Turn checkpoints of LLaMA2-Accessory's multimodal models into our weights and back.

https://github.com/Alpha-VLLM/LLaMA2-Accessory. A directory holds consolidated.*-of-*.model.pth, one file a rank
(`meta_shards.merge_shards`), or *.model-diff.pth to be added to a base (`meta_shards.add_difference`). Names begin
with "llma."; the kind of model is that of meta.json, else told by the keys.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llava_lite.formats import meta_llama, openai_clip, query_vit
from llava_lite.formats.gated_prompts import (
    LLAMA,
    PROMPTS,
    TOWER,
    base_fields,
    check_additions,
    get_fields,
    get_state,
    inspect_llama,
    llama_peer_name,
    plain_weights,
    prompt_fields,
    refuse_unknown,
    require,
    resolve,
    without_prefix,
)
from llava_lite.formats.llama_adapter import CLIP, CLIP_FIELDS, clip_fields, clip_from
from llava_lite.formats.llama_shapes import check_connector, check_shapes, prompted_layers, with_biases

WHAT = "weights of LLaMA2-Accessory"
PREFIX = "llma."
QFORMER = "qformer."
QFORMER_NAME = "Salesforce/blip2-opt-2.7b"
# Kinds by the names of their parts; `_peft` adds biases and LoRA to the kind before it.
KINDS = ("llama", "llama_peft", "llama_qformerv2", "llama_qformerv2_peft", "llama_adapter")
CONNECTOR = {
    f"qformer_proj.{part}": f"model.mm_projector.{part}" for part in ("0.weight", "0.bias", "1.weight", "1.bias")
}
BOUNDARIES = {"start_img": "model.image_start", "end_img": "model.image_end"}
# Of SPHINX: several encoders side by side.
ENSEMBLE = ("openclip_convnext_xxl.", "dinov2_vitg14.", "visual_proj.0.", "visual_proj.1.")
DEFAULTS = {
    "model_type": "llava_llama",
    "image_aspect_ratio": "square",
    "conv_template": "alpaca",
    "image_channels": "rgb",
}
QFORMER_FIELDS = {
    "mm_injection": "tokens",
    "mm_image_position": "front",
    "mm_boundary_vectors": True,
    "mm_vision_tower": QFORMER_NAME,
}
# Prompts pass LoRA of wk and wv here, and a text without an image has the prompts alone.
PROMPT_FIELDS = {"mm_injection": "adaption_prompt", "adaption_prompt_lora": True, "mm_text_only": "bare"}


def strip(checkpoint: Mapping) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint without the prefix of their names."""
    return {name.removeprefix(LLAMA): tensor for name, tensor in get_state(checkpoint).items()}


def claims(state: Mapping) -> bool:
    """Tell whether a checkpoint (its weights, or what holds them under "model") is of LLaMA2-Accessory."""
    state = state["model"] if isinstance(state.get("model"), Mapping) else state
    return bool(state) and all(name.startswith(PREFIX) for name in state)


def kind_of(state: Mapping) -> str:
    """Return the kind of model that a checkpoint is of, one of KINDS; ValueError for one that is not read here."""
    state = strip(state)
    ensemble = [name for name in state if name.startswith(ENSEMBLE)]
    if ensemble:
        raise ValueError(
            f"{WHAT}: {ensemble[:2]} are of SPHINX, a mixture of encoders (llama_ens*), which is not read here. Read "
            f"are: {', '.join(KINDS)}."
        )
    if "prefix" in state:
        return "llama_adapter"
    if "clip_proj.weight" in state:
        raise ValueError(
            f"{WHAT}: clip_proj without prefix is the kind llama with CLIP's tokens in front, which is not read here. "
            f"Read are: {', '.join(KINDS)}."
        )
    is_peft = any(".lora_a." in name or (name.startswith("layers.") and name.endswith(".bias")) for name in state)
    return ("llama_qformerv2" if any(name in CONNECTOR for name in state) else "llama") + "_peft" * is_peft


def is_stated(kind: str | None, found: str) -> bool:
    """Tell whether the keys, of kind `found`, agree with a stated kind; `_peft` may add nothing, None states none."""
    return kind is None or kind.removesuffix("_peft") == found.removesuffix("_peft")


def config_from(params: Mapping, state: Mapping, kind: str | None = None, **options) -> dict:
    """Return the fields of our config for params.json (and config.json) of a directory and its merged weights.

    kind: that of meta.json; None: told by the keys. options: config keys that weights do not tell, such as
    mm_query_heads (default 16), vision_config, and vocab_size where params.json says -1. Raises ValueError with both
    numbers for a base of another width, number of heads or layers, or vocabulary, and for a kind that the keys are
    not of.
    """
    state = strip(state)
    found = kind_of(state)
    if not is_stated(kind, found):
        raise ValueError(
            f"{WHAT}: the checkpoint is said to be {kind!r} and its keys are of {found!r}. Leave the kind out."
        )
    base = base_fields(params, state.get("tok_embeddings.weight"), options.pop("vocab_size", None))
    # Gates are outside the layers here.
    told = {"decoder_bias": inspect_llama(state, base, WHAT)["decoder_bias"]}
    defaults = {**base, **DEFAULTS}
    if found.startswith("llama_qformerv2"):
        defaults |= QFORMER_FIELDS
        require(state, CONNECTOR, WHAT)
        told |= {"mm_projector_type": "linear_norm", "mm_hidden_size": state["qformer_proj.0.weight"].shape[1]}
    elif found == "llama_adapter":
        defaults |= PROMPT_FIELDS
        told |= _prompt_fields(state, base)
        if query_vit.is_there(state):
            told |= query_vit.config_from_weights(state, base["hidden_size"])
            check_num_prompts(told)
            defaults |= CLIP_FIELDS | clip_fields(state, told["mm_hidden_size"])
    return resolve(defaults, told, options)


def _prompt_fields(state, base):
    require(state, ["prefix", "prefix_gate"], WHAT)
    gates, prompts = state["prefix_gate"], state["prefix"]
    if gates.shape[1] != base["num_attention_heads"]:
        raise ValueError(
            f"{WHAT}: prefix_gate is of {gates.shape[1]} heads and the base has {base['num_attention_heads']}. "
            "Merge the files of all ranks, or give the base that it was trained with."
        )
    fields = prompt_fields(prompts.flatten(0, 2), prompts.shape[2], base, WHAT)
    return fields | {"adaption_prompt_new_gate": "prefix_new_gate" in state}


def check_num_prompts(fields: Mapping) -> None:
    """Raise ValueError with both numbers unless an image gives as many vectors as a layer has prompts."""
    queries, prompts = fields["mm_query_len"], fields["adaption_prompt_len"]
    if queries != prompts:
        raise ValueError(f"{WHAT}: visual_query has {queries} rows and prefix has {prompts} prompts a layer.")


def weights_from(state: Mapping, config) -> dict[str, torch.Tensor]:
    """Return a directory's merged weights under our names, views where possible; without the base if it holds none.

    Raises ValueError for a name that is not known or missing, and for a shape that is not that of the config.
    """
    state, config = strip(state), get_fields(config)
    kind = kind_of(state)
    llama = {name: w for name, w in state.items() if name.startswith("layers.") or name in meta_llama.OUTSIDE}
    rest = {name: w for name, w in state.items() if name not in llama and not name.endswith(meta_llama.DROPPED)}
    weights = meta_llama.weights_from(llama, config["num_attention_heads"], config.get("num_key_value_heads"))
    if kind.startswith("llama_qformerv2"):
        weights |= _qformer_from(rest, config)
    elif kind == "llama_adapter":
        weights |= _adapter_from(rest, config)
    else:
        refuse_unknown(rest, WHAT)
    check_shapes(weights, config, WHAT)
    check_additions(weights, config, WHAT)
    return weights


def _qformer_from(state, config):
    known = [*CONNECTOR, *BOUNDARIES]
    require(state, known, WHAT)
    refuse_unknown((name for name in state if name not in known and not name.startswith(QFORMER)), WHAT)
    width = config["hidden_size"]
    shapes = {"qformer_proj.0": (width, config["mm_hidden_size"]), "qformer_proj.1": (width,)}
    check_connector(state, with_biases(shapes), width, WHAT)
    weights = {ours: state[name] for name, ours in CONNECTOR.items()}
    weights |= {ours: state[name].reshape(-1) for name, ours in BOUNDARIES.items()}
    return weights | {f"{TOWER}{name}": tensor for name, tensor in without_prefix(state, QFORMER).items()}


def _adapter_from(state, config):
    parts = {"prefix", "prefix_gate", "prefix_new_gate"}
    others = (n for n in state if n not in parts and not n.startswith(CLIP) and not query_vit.our_name(n))
    refuse_unknown((name for name in others if not openai_clip.is_text(name)), WHAT)
    require(state, ["prefix", "prefix_gate"], WHAT)
    weights = {PROMPTS: state["prefix"].flatten(0, 2)}
    for i, layer in enumerate(prompted_layers(config)):
        place = f"model.layers.{layer}.self_attn."
        weights[f"{place}adaption_gate"] = state["prefix_gate"][i]
        if "prefix_new_gate" in state:
            weights[f"{place}adaption_new_gate"] = state["prefix_new_gate"][i : i + 1]
    if query_vit.is_there(state):
        weights |= query_vit.weights_from(state, config)
    return weights | clip_from(state)


def weights_to(state: Mapping, config) -> dict[str, torch.Tensor]:
    """Return our weights under Accessory's names, as one file for a single rank holds them under "model".

    What `state` holds is written: the base and the encoder too. Raises ValueError for a name that has no place.
    """
    weights, config = plain_weights(state), get_fields(config)
    llama = {name: w for name, w in weights.items() if meta_llama.meta_name(name) and ".adaption_" not in name}
    heads = config["num_attention_heads"], config.get("num_key_value_heads")
    written = meta_llama.weights_to(llama, *heads, spelling="accessory")
    rest = {name: w for name, w in weights.items() if name not in llama}
    written |= _prompts_to(rest, config) if PROMPTS in rest else {}
    for name, tensor in rest.items():
        if not name.startswith(TOWER) and name != PROMPTS and ".adaption_" not in name:
            written[peer_name(name, config).removeprefix(PREFIX)] = tensor
    written |= {name: written[name].reshape(1, 1, -1) for name in BOUNDARIES if name in written}
    tower = without_prefix(rest, TOWER)
    if config.get("mm_injection") == "adaption_prompt":
        written |= openai_clip.weights_to(tower, CLIP)
    else:
        written |= {f"{QFORMER}{name}": tensor for name, tensor in tower.items()}
    return {f"{PREFIX}{name}": tensor for name, tensor in written.items()}


def _prompts_to(weights, config):
    layers = prompted_layers(config)
    check_additions(weights, config | {"decoder_bias": None}, "the model")
    places = [f"model.layers.{layer}.self_attn.adaption_" for layer in layers]
    written = {"prefix": weights[PROMPTS].reshape(len(layers), 1, -1, config["hidden_size"])}
    written["prefix_gate"] = torch.stack([weights[f"{place}gate"] for place in places])
    if config.get("adaption_prompt_new_gate"):
        written["prefix_new_gate"] = torch.cat([weights[f"{place}new_gate"] for place in places])
    return written


def peer_name(name: str, config) -> str:
    """Return Accessory's name of one of our weights; ValueError if it has none. All gates are one weight there."""
    [plain] = plain_weights({name: None})
    has_prompts = get_fields(config).get("mm_injection") == "adaption_prompt"
    outside = {ours: theirs for theirs, ours in {**CONNECTOR, **BOUNDARIES}.items()} | {PROMPTS: "prefix"}
    if plain.startswith(TOWER):
        inner = plain.removeprefix(TOWER)
        inside = openai_clip.openai_name(inner) if has_prompts else inner
        found = inside and (CLIP if has_prompts else QFORMER) + inside
    elif plain.endswith(("adaption_gate", "adaption_new_gate")):
        found = "prefix_" + plain.rsplit("adaption_", 1)[1]
    elif has_prompts and query_vit.original_name(plain):
        found = query_vit.original_name(plain).replace(*query_vit.QUERIES)
    else:
        found = outside.get(plain) or llama_peer_name(plain, "", "accessory")
    if found is None:
        raise ValueError(f"LLaMA2-Accessory has no weight for {name!r}.")
    return f"{PREFIX}{found}"
