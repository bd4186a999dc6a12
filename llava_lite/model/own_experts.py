"""Turn the flags of a further stage and a model that has experts into that model's routing, or refuse.

Its experts stay as they are: a finished stage 3 of MoE-LLaVA (Lin et al. 2024, arXiv 2401.15947) goes on training.
"""

from __future__ import annotations

import logging

from llava_lite.model.moe_config import MoeConfig, moe_layer_indices, read_moe_config

logger = logging.getLogger(__name__)

# What the weights were made or trained for. With another number of choices the very first answer would be another.
FIXED = ("num_experts", "top_k_experts", "use_residual")
# What a stage may choose anew: how the balance is kept, and what overloaded experts do.
FREE = (
    "router_aux_loss_coef",
    "moe_drop_tokens",
    "capacity_factor",
    "eval_capacity_factor",
    "min_capacity",
    "moe_second_expert_sampling",
    "moe_count_padding",
)


def take_own_experts(model, said: dict) -> None:
    """Let a model that has experts train with them as they are, and with the routing that `said` chooses anew.

    said: the keys of `config.moe` that flags name. Raises ValueError, both values named, where they describe other
    experts than the model has.
    """
    num_layers = model.config.num_hidden_layers
    own = read_moe_config(model.config.moe, num_layers)
    refuse_other_experts(own, said, num_layers)
    fields = {**own.to_dict(), **{key: said[key] for key in FREE if key in said}}
    # What trains is this stage's, all experts if it names nothing.
    fields["train_modules"] = said.get("train_modules")
    taken = read_moe_config(fields, num_layers)
    changed = [f"{key} {getattr(taken, key)} (was {getattr(own, key)})" for key in FREE if differs(own, taken, key)]
    for block in model.moe_layers().values():
        block.moe = taken
    model.config.moe = taken.to_dict()
    logger.info(
        "Layers %s have experts already, %s of them: they go on training as they are%s.",
        *(list(own.layers), list(own.num_experts), f", with {', '.join(changed)}" if changed else ""),
    )


def differs(own: MoeConfig, taken: MoeConfig, key: str) -> bool:
    """Tell whether two configs say different things under a key."""
    return getattr(own, key) != getattr(taken, key)


def refuse_other_experts(own: MoeConfig, said: dict, num_layers: int) -> None:
    """Raise ValueError if flags name other experts than the model has."""
    found = []
    flag = "moe_layers_idx" if "moe_layers_idx" in said else "moe_mode"
    if flag in said:
        layers = moe_layer_indices(said.get("moe_mode", own.moe_mode), num_layers, said.get("moe_layers_idx"))
        if layers != own.layers:
            found.append(
                f"--{flag} {in_words(said[flag])}, which is layers {in_words(layers)}, and has experts in "
                f"layers {in_words(own.layers)}"
            )
    for key in FIXED:
        if key in said and expanded(said[key], own, key) != getattr(own, key):
            found.append(f"--{key} {in_words(said[key])} and has {in_words(once(getattr(own, key)))}")
    if found:
        raise ValueError(
            f"this model has experts already, which go on training, and the flags describe others: it is asked for "
            f"{'; for '.join(found)}. Leave the flags out to keep its own, or make new experts from the dense "
            "checkpoint of stage 2."
        )


def expanded(value, own: MoeConfig, key: str):
    """Return what a flag says in the form of MoeConfig: one number of experts for each layer that has some."""
    if key != "num_experts":
        return value
    return tuple(value) * (len(own.layers) if len(value) == 1 else 1)


def in_words(value) -> str:
    """Return a value as it is written after a flag."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def once(value):
    """Return numbers that are the same for all layers as one."""
    return value[:1] if isinstance(value, tuple) and len(set(value)) == 1 else value
