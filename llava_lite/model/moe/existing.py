"""Apply the flags of a further stage to a model that has experts: its routing may change, its experts may not.

A finished stage 3 of MoE-LLaVA (Lin et al. 2024, arXiv 2401.15947) trains on with the experts it has.
"""

from __future__ import annotations

import logging

from llava_lite.model.moe.config import MoeConfig, moe_layer_indices, read_moe_config

logger = logging.getLogger(__name__)

# Fixed by the weights. With another top_k_experts the outputs would differ before the first step.
FIXED = ("num_experts", "top_k_experts", "use_residual")
# A stage may choose these again: balance loss, capacity, noise.
FREE = (
    "router_aux_loss_coef",
    "moe_drop_tokens",
    "capacity_factor",
    "eval_capacity_factor",
    "min_capacity",
    "moe_second_expert_sampling",
    "moe_count_padding",
)


def keep_own_experts(model, given: dict) -> None:
    """Let a model train with the experts it has, and with the routing that `given` names.

    given: the keys of `config.moe` that flags name. Raises ValueError with both values where they describe other
    experts than the model has.
    """
    num_layers = model.config.num_hidden_layers
    own = read_moe_config(model.config.moe, num_layers)
    check_same_experts(own, given, num_layers)
    fields = {**own.to_dict(), **{key: given[key] for key in FREE if key in given}}
    # train_modules is this stage's alone; without it all experts train.
    fields["train_modules"] = given.get("train_modules")
    chosen = read_moe_config(fields, num_layers)
    changed = [f"{key} {getattr(chosen, key)} (was {getattr(own, key)})" for key in FREE if differs(own, chosen, key)]
    for block in model.moe_layers().values():
        block.moe = chosen
    model.config.moe = chosen.to_dict()
    logger.info(
        "Layers %s have experts already, %s of them: they train on as they are%s.",
        *(list(own.layers), list(own.num_experts), f", with {', '.join(changed)}" if changed else ""),
    )


def differs(own: MoeConfig, chosen: MoeConfig, key: str) -> bool:
    """Return whether two configs have different values under a key."""
    return getattr(own, key) != getattr(chosen, key)


def check_same_experts(own: MoeConfig, given: dict, num_layers: int) -> None:
    """Raise ValueError if flags name other experts than the model has."""
    found = []
    flag = "moe_layers_idx" if "moe_layers_idx" in given else "moe_mode"
    if flag in given:
        layers = moe_layer_indices(given.get("moe_mode", own.moe_mode), num_layers, given.get("moe_layers_idx"))
        if layers != own.layers:
            found.append(
                f"--{flag} {as_flag(given[flag])}, which is layers {as_flag(layers)}, and has experts in "
                f"layers {as_flag(own.layers)}"
            )
    for key in FIXED:
        if key in given and expanded(given[key], own, key) != getattr(own, key):
            found.append(f"--{key} {as_flag(given[key])} and has {as_flag(once(getattr(own, key)))}")
    if found:
        raise ValueError(
            f"this model has experts already, which train on, and the flags describe others: it is asked for "
            f"{'; for '.join(found)}. Leave the flags out to keep its own, or make new experts from the dense "
            "checkpoint of stage 2."
        )


def expanded(value, own: MoeConfig, key: str):
    """Return a flag's value in the form of MoeConfig: one number of experts for each MoE layer."""
    if key != "num_experts":
        return value
    return tuple(value) * (len(own.layers) if len(value) == 1 else 1)


def as_flag(value) -> str:
    """Return a value as it is written after a flag."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def once(value):
    """Return a single number where all layers have the same."""
    return value[:1] if isinstance(value, tuple) and len(set(value)) == 1 else value
