"""What checkpoints of LLaMA-Adapter V2 and ImageBind-LLM have in common: a LLaMA with gated prompts in its layers.

`state` is a checkpoint's weights with the LLaMA's under "llama."; `weights` are ours. A release holds what was
trained; a checkpoint of a run holds the base and the encoder too. K prompts of a layer, Q layers with prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from llava_lite.formats import meta_llama
from llava_lite.formats.llama_shapes import biased_linears, check_shapes, prompted_layers
from llava_lite.formats.llava import plain_name

LLAMA = "llama."
TOWER = "model.vision_tower.vision_tower."
PROMPTS = "model.adaption_prompt.query"
# The vocabulary that both originals demand of their base, where params.json says -1.
VOCAB_SIZE = 32000
# What checkpoints of any stage share. Releases were trained with a blank image where a text has none.
FIELDS = {
    "model_type": "llava_llama",
    "mm_injection": "adaption_prompt",
    "adaption_prompt_lora": False,
    "mm_text_only": "blank",
    "image_aspect_ratio": "square",
    "conv_template": "alpaca",
}
# Arguments of the originals' constructors -> config keys.
OPTIONS = {
    "query_len": "adaption_prompt_len",
    "prefix_len": "adaption_prompt_len",
    "query_layer": "adaption_prompt_layers",
    "prefix_layers": "adaption_prompt_layers",
    "w_new_gate": "adaption_prompt_new_gate",
    "use_prefix_new_gate": "adaption_prompt_new_gate",
    "v_embed_dim": "mm_query_hidden",
    "v_depth": "mm_query_depth",
    "v_num_heads": "mm_query_heads",
    "v_mlp_ratio": "mm_query_mlp_ratio",
}


def get_state(checkpoint: Mapping) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint: what stands under "model" if it has that, and "llma." read as "llama."."""
    state = checkpoint["model"] if isinstance(checkpoint.get("model"), Mapping) else checkpoint
    return {LLAMA + name.removeprefix("llma.") if name.startswith("llma.") else name: w for name, w in state.items()}


def get_fields(config) -> Mapping:
    """Return the fields of a config, whether it is a dict or an object of transformers."""
    return config if isinstance(config, Mapping) else config.to_dict()


def without_prefix(state: Mapping, prefix: str) -> dict:
    """Return the weights whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def base_fields(params: Mapping, embeddings: torch.Tensor | None, vocab_size: int | None = None) -> dict:
    """Return the fields of the base: of params.json, its vocabulary that of the embeddings where there are some.

    Raises ValueError where the three say different vocabulary sizes.
    """
    found = vocab_size if embeddings is None else len(embeddings)
    if vocab_size not in (None, found):
        raise ValueError(
            f"the embeddings have {found} rows and vocab_size is {vocab_size}. Give the tokenizer of this checkpoint."
        )
    if found is None and params.get("vocab_size", -1) in (None, -1):
        found = VOCAB_SIZE
    return meta_llama.config_from_params(params, found)


def inspect_llama(state: Mapping[str, torch.Tensor], fields: Mapping, what: str) -> dict:
    """Return what a checkpoint adds to the LLaMA's layers, as config keys; ValueError if it does not fit the base.

    state: weights under Meta's names without a prefix; names of other parts are left alone.
    """
    named = {meta_llama.our_name(name): tensor for name, tensor in state.items()}
    named = {name: t.reshape(-1) if "adaption_" in name else t for name, t in named.items() if name is not None}
    check_shapes(named, fields, what)
    return {
        "decoder_bias": biased_linears(named) or None,
        "adaption_prompt_new_gate": any(name.endswith("new_gate") for name in named),
    }


def prompt_fields(table: torch.Tensor, num_prompts: int, fields: Mapping, what: str) -> dict:
    """Return the config keys of a table of prompts [Q*K, D]; ValueError with both numbers if it fits no base."""
    rows, width = table.shape
    if width != fields["hidden_size"]:
        raise ValueError(
            f"{what}: prompts are {width} wide and the base is {fields['hidden_size']}. {meta_llama.ANOTHER_BASE}"
        )
    if rows % num_prompts or rows // num_prompts > fields["num_hidden_layers"]:
        raise ValueError(
            f"{what}: a table of {rows} prompts, {num_prompts} a layer, is for {rows / num_prompts:g} layers, and the "
            f"base has {fields['num_hidden_layers']}. {meta_llama.ANOTHER_BASE}"
        )
    return {"adaption_prompt_len": num_prompts, "adaption_prompt_layers": rows // num_prompts}


def resolve(defaults: Mapping, told: Mapping, options: Mapping) -> dict:
    """Return the fields of a config: defaults, what the weights tell, and what the caller says.

    Raises ValueError with both values where the caller and the weights say different things.
    """
    options = {OPTIONS.get(key, key): value for key, value in options.items()}
    if isinstance(options.get("vision_config"), Mapping):
        # Weights do not tell the number of heads: a caller gives that alone.
        options["vision_config"] = {**defaults.get("vision_config", {}), **options["vision_config"]}
    for key, value in options.items():
        if key in told and told[key] != value:
            raise ValueError(
                f"{key} is {told[key]!r} in the checkpoint and {value!r} was asked for. Leave it out, or give the "
                "checkpoint that was trained so."
            )
    fields = {**defaults, **told, **options}
    heads = fields.get("mm_query_heads")
    if fields.get("mm_projector_type") == "query_vit" and fields["mm_query_hidden"] % heads:
        raise ValueError(
            f"the visual query is {fields['mm_query_hidden']} wide, which {heads} heads do not divide; weights do not "
            "tell the number of heads, give mm_query_heads=."
        )
    return fields


def require(state: Mapping, names: Iterable[str], what: str) -> None:
    """Raise ValueError with the names that a checkpoint lacks."""
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"{what}: {missing[:4]} ({len(missing)} in all) are missing. Give a complete checkpoint.")


def refuse_unknown(names: Iterable[str], what: str) -> None:
    """Raise ValueError if there are names, those that a checkpoint of this system does not have."""
    names = list(names)
    if names:
        raise ValueError(
            f"{what}: {names[:4]} ({len(names)} in all) are not known in such a checkpoint. If it is of another "
            "system, open it as that."
        )


def llama_from(state: Mapping[str, torch.Tensor], config: Mapping, what: str) -> dict[str, torch.Tensor]:
    """Return what a checkpoint holds of the LLaMA under our names: the base too, or what was added to it alone.

    Both originals have a gate in every layer and read those of the last Q; the others are left out. Raises ValueError
    for weights of another base, for missing gates, and for biases or gates that the config does not have.
    """
    heads = config["num_attention_heads"], config.get("num_key_value_heads")
    weights = meta_llama.weights_from(state, *heads, prefix=LLAMA)
    check_shapes(weights, config, what)
    layers = tuple(f"model.layers.{layer}." for layer in prompted_layers(config))
    weights = {name: w for name, w in weights.items() if "adaption_" not in name or name.startswith(layers)}
    check_additions(weights, config, what)
    return weights


def prompts_from(state: Mapping[str, torch.Tensor], config: Mapping, table: str, what: str) -> dict[str, torch.Tensor]:
    """Return the prompts, `table` in the original, under our name; ValueError if they are missing or do not fit."""
    require(state, [table], what)
    check_shapes({PROMPTS: state[table]}, config, what)
    return {PROMPTS: state[table]}


def check_additions(weights: Mapping, config: Mapping, what: str) -> None:
    """Raise ValueError unless the biases and gates among our weights are those that the config has."""
    found, expected = biased_linears(weights), config.get("decoder_bias") or []
    if set(found) != set(expected):
        raise ValueError(
            f"{what}: linear layers with a bias are {found}, and decoder_bias of the config is {expected}. Take the "
            "config that config_from makes of these weights."
        )
    kinds = ["adaption_gate"] + ["adaption_new_gate"] * bool(config.get("adaption_prompt_new_gate"))
    gates = [f"model.layers.{layer}.self_attn.{kind}" for layer in prompted_layers(config) for kind in kinds]
    require(weights, gates, what)
    refuse_unknown((name for name in weights if "self_attn.adaption_" in name and name not in gates), what)


def plain_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return our weights without PEFT's prefixes and adapter names, as formats write them."""
    return {plain_name(name).replace(".default.", "."): tensor for name, tensor in weights.items()}


def is_of_base(name: str) -> bool:
    """Tell whether one of our weights belongs to the base language model, which no release holds."""
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return True
    linear = name.removesuffix(".weight")
    return name != linear and ".lora_" not in name and linear.endswith(tuple(meta_llama.LINEARS.values()))


def write_release(state: Mapping, config: Mapping, table: str, connector: Mapping[str, str]) -> dict:
    """Return our weights in the layout of a release, bit for bit; the base and the encoder are left out, as there.

    table: its name of the prompts. connector: {its name of a weight: ours}. Norms are written where `state` has them.
    The gates of layers without prompts, which do nothing, are 0 and the second ones 1, as the originals make them.
    Raises ValueError for a name that the layout has no place for.
    """
    weights = plain_weights(state)
    named = {**connector, table: PROMPTS}
    require(weights, named.values(), "the model")
    written = {theirs: weights.pop(ours) for theirs, ours in named.items()}
    added = {name: w for name, w in weights.items() if not name.startswith(TOWER) and not is_of_base(name)}
    refuse_unknown((name for name in added if llama_peer_name(name) is None), "the model")
    check_additions(added, config, "the model")
    unused = range(config["num_hidden_layers"] - len(prompted_layers(config)))
    for kind, value in (("adaption_gate", 0.0), ("adaption_new_gate", 1.0)):
        gate = added.get(f"model.layers.{config['num_hidden_layers'] - 1}.self_attn.{kind}")
        if gate is not None:
            added |= {f"model.layers.{i}.self_attn.{kind}": torch.full_like(gate, value) for i in unused}
    heads = config["num_attention_heads"], config.get("num_key_value_heads")
    return written | meta_llama.weights_to(added, *heads, prefix=LLAMA)


def llama_peer_name(name: str, prefix: str = LLAMA, spelling: str = "llama_adapter") -> str | None:
    """Return an original's name of one of our decoder's weights, None for a weight of something else."""
    theirs = meta_llama.meta_name(name, spelling)
    return None if theirs is None else prefix + theirs
