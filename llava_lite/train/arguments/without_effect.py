"""Find the flags that have no effect in a run."""

# Of experts, with a default, which many scripts repeat: logged, and no error.
MOE_SETTINGS = (
    "moe_mode",
    "top_k_experts",
    "use_residual",
    "router_aux_loss_coef",
    "moe_drop_tokens",
    "moe_second_expert_sampling",
    "moe_count_padding",
)
CAPACITY_FLAGS = ("capacity_factor", "eval_capacity_factor", "min_capacity")
LORA_FLAGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_bias", "lora_vision_tower")


def without_effect(model_args, training_args):
    """Return [(flag with its value, reason)] of the flags that have no effect in this run."""
    tuning = training_args.tuning
    idle = []
    if tuning != "moe":
        idle += [(model_args, MOE_SETTINGS + CAPACITY_FLAGS, f"--tuning {tuning} makes no experts")]
    elif not model_args.moe_drop_tokens:
        # A model that has experts may drop tokens although the flag is not given.
        reason = "without --moe_drop_tokens True no token is dropped"
        if "moe_drop_tokens" not in (model_args.given or ()):
            reason += ", unless the model's own experts drop some already"
        idle += [(model_args, CAPACITY_FLAGS, reason)]
    if not training_args.lora_enable:
        idle += [(training_args, LORA_FLAGS, f"--tuning {tuning} has no adapters")]
    if training_args.packing == "tokens":
        reason = "packs of --packing tokens are about equally long, in an order of their own"
        idle += [(training_args, ("group_by_modality_length", "train_sampling_strategy"), reason)]
    else:
        idle += [(training_args, ("packing_tokens",), f"--packing {training_args.packing} counts records")]
    return [
        (f"--{flag} {getattr(args, flag)}", reason)
        for args, flags, reason in idle
        for flag in flags
        if getattr(args, flag) != type(args).__dataclass_fields__[flag].default
    ]
