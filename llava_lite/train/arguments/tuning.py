"""What --tuning may be, and the older flags that ask for it."""

from llava_lite.train.arguments.refuse import check_pair, raise_if

TUNING_NAMES = ("projector", "full", "lora", "moe", "prompts", "bias_norm")
# Those that train so few weights that only these are written at the end.
PARTIAL_TUNINGS = ("projector", "lora", "prompts", "bias_norm")
# Linear layers that get a bias with --tuning bias_norm: those of LLaMA-Adapter V2, and with `all` of LLaMA2-Accessory.
BIAS_LINEARS = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The flag that stands for each tuning in LLaVA's and MoE-LLaVA's scripts, where it is True.
TUNING_FLAGS = {"tune_mm_mlp_adapter": "projector", "lora_enable": "lora", "moe_enable": "moe"}


def resolve_tuning(model_args, training_args):
    """Set `training_args.tuning` from the older flags, and the older flags from it.

    Raises ValueError that names the flags if they ask for different tunings.
    """
    owners = {flag: model_args if hasattr(model_args, flag) else training_args for flag in TUNING_FLAGS}
    given = {f"{flag} True": tuning for flag, tuning in TUNING_FLAGS.items() if getattr(owners[flag], flag)}
    adds_lora = training_args.tuning == "bias_norm" and training_args.lora_enable
    if adds_lora:
        given.pop("lora_enable True")
    if training_args.tuning is not None:
        given = {f"tuning {training_args.tuning}": training_args.tuning, **given}
    raise_if(
        len(set(given.values())) > 1,
        f"{' and '.join(f'--{flag}' for flag in given)} contradict each other; give one --tuning of "
        f"{', '.join(TUNING_NAMES)}.",
    )
    training_args.tuning = next(iter(given.values()), "full")
    for flag, tuning in TUNING_FLAGS.items():
        setattr(owners[flag], flag, tuning == training_args.tuning)
    training_args.lora_enable = training_args.lora_enable or adds_lora
    resolve_biases(model_args, training_args.tuning)
    check_connector_biases(model_args, training_args)


def resolve_biases(model_args, tuning):
    """Set --bias_linears to names: those of --tuning bias_norm where it is not given, else for `all` and `none`."""
    names = model_args.bias_linears
    if names is None and tuning == "bias_norm":
        names = BIAS_LINEARS
    elif names in (["all"], ["none"]):
        names = ALL_LINEARS if names == ["all"] else []
    raise_if(
        names is not None and tuning not in ("bias_norm", "full"),
        f"--bias_linears {' '.join(names or [])} adds biases that --tuning {tuning} does not train; give --tuning "
        "bias_norm.",
    )
    model_args.bias_linears = names


def check_connector_biases(model_args, training_args):
    """Raise ValueError for --bias_connector with flags that train the connector in another way, or not at all."""
    if not model_args.bias_connector:
        return
    tuning = training_args.tuning
    raise_if(
        tuning != "bias_norm",
        f"--bias_connector True trains the connector's biases beside those of --tuning bias_norm, and --tuning is "
        f"{tuning}; leave the flag out, or give --tuning bias_norm.",
    )
    check_pair(training_args.freeze_mm_mlp_adapter, "bias_connector True", "freeze_mm_mlp_adapter True")
