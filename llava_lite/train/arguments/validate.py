"""Check the flags of a run against each other, and resolve those that depend on others: tuning and packing."""

import json
import logging

logger = logging.getLogger(__name__)

TUNING_NAMES = ("projector", "full", "lora", "moe", "prompts", "bias_norm")
# Those that train so few weights that only these are written at the end.
PARTIAL_TUNINGS = ("projector", "lora", "prompts", "bias_norm")
# Linear layers that get a bias with --tuning bias_norm: those of LLaMA-Adapter V2, and with `all` of LLaMA2-Accessory.
BIAS_LINEARS = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The flag that stands for each tuning in LLaVA's and MoE-LLaVA's scripts, where it is True.
TUNING_FLAGS = {"tune_mm_mlp_adapter": "projector", "lora_enable": "lora", "moe_enable": "moe"}
# Flags for experts only.
MOE_FLAGS = ("train_modules", "num_experts", "moe_layers_idx")
# Further ones with a default, which many scripts repeat: logged, and no error, where they have no effect.
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
AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "model_max_length",
    "lora_r",
)
NOT_NEGATIVE = (
    "learning_rate",
    "mm_projector_lr",
    "mm_vision_tower_lr",
    "weight_decay",
    "warmup_steps",
    "max_grad_norm",
    "dataloader_num_workers",
    "max_skipped_steps",
)
# Optimizers, by a part of their name, that change weights without a gradient or before all of them are known.
UPDATES_ANYWAY = ("lomo", "layerwise", "schedule_free")
LORA_FLAGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_bias", "lora_vision_tower")


def raise_if(condition, message):
    """Raise ValueError with `message` if `condition` holds."""
    if condition:
        raise ValueError(message)


def check_pair(condition, first, second):
    """Raise ValueError naming two flags, with their values, that cannot both hold."""
    raise_if(condition, f"--{first} and --{second} contradict each other; drop one.")


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


def resolve_packing(model_args, training_args):
    """Set --packing where it is not given: records in one sequence, unless another flag needs padding."""
    args = training_args
    reason = needs_padding(model_args, args)
    if args.packing is None:
        args.packing = "none" if reason else "samples"
        if reason:
            logger.info("--packing none: %s.", reason)
    if args.packing == "tokens" and args.packing_tokens is None:
        args.packing_tokens = 4 * args.model_max_length


def needs_padding(model_args, training_args):
    """Return the flag that needs padded records, and why; None if there is none."""
    if model_args.moe_count_padding and training_args.tuning == "moe":
        return "--moe_count_padding True routes padding, and packed sequences have none"
    if training_args.parallelism_config is not None:
        return "--parallelism_config cuts sequences at positions where the records of a packed one do not end"
    if training_args.torch_compile:
        return "--torch_compile True compiles again for every length, and packed sequences differ in length"
    return None


def check_packing(model_args, training_args):
    """Raise ValueError for flags that contradict --packing."""
    args = training_args
    reason = needs_padding(model_args, args)
    raise_if(
        args.packing != "none" and reason is not None, f"--packing {args.packing} and {reason}; drop one of the flags."
    )
    if args.packing != "tokens":
        return
    raise_if(args.packing_tokens < 1, f"--packing_tokens {args.packing_tokens}: a pack holds at least one token.")
    raise_if(
        args.per_device_train_batch_size != 1,
        f"--packing tokens and --per_device_train_batch_size {args.per_device_train_batch_size}: a micro-batch is one "
        f"pack of up to {args.packing_tokens:,} tokens; give --per_device_train_batch_size 1, and --packing_tokens "
        "for its size.",
    )


def check_model(args):
    """Raise ValueError for flags of ModelArguments that contradict each other."""
    from llava_lite.conversation import get_template

    get_template(args.version)
    for flag in ("chat_end_token", "enable_thinking"):
        raise_if(
            getattr(args, flag) is not None and args.version != "chat",
            f"--{flag} {getattr(args, flag)} is for the tokenizer's own chat template and --version is "
            f"{args.version}; drop one, or give --version chat.",
        )
    least = min(args.num_experts or [4])
    raise_if(
        not 1 <= args.top_k_experts <= least,
        f"--top_k_experts {args.top_k_experts} with --num_experts {least}: a token is routed to 1 to {least} experts.",
    )
    raise_if(args.ep_size < 1, f"--ep_size {args.ep_size}: at least one rank holds the experts.")
    raise_if(
        args.moe_second_expert_sampling != "never" and args.top_k_experts != 2,
        f"--moe_second_expert_sampling {args.moe_second_expert_sampling} draws the second of two experts and "
        f"--top_k_experts is {args.top_k_experts}; drop one.",
    )
    check_pair(args.train_modules is not None and args.freeze_backbone, "train_modules", "freeze_backbone True")


def check_data(args):
    """Raise ValueError for flags of DataArguments that contradict each other."""
    from llava_lite.constants import ASPECT_RATIOS
    from llava_lite.media.anyres import read_pinpoints

    raise_if(
        args.image_aspect_ratio not in (None, *ASPECT_RATIOS),
        f"unknown --image_aspect_ratio {args.image_aspect_ratio!r}; known: {', '.join(ASPECT_RATIOS)}.",
    )
    check_pair(
        args.image_grid_pinpoints is not None and args.image_aspect_ratio not in (None, "anyres"),
        f"image_grid_pinpoints {args.image_grid_pinpoints}",
        f"image_aspect_ratio {args.image_aspect_ratio}",
    )
    if args.image_grid_pinpoints is not None:
        # Whether they fit the tower is checked when it is known.
        read_pinpoints(args.image_grid_pinpoints, 1)
    # YAML reads off as False.
    if str(args.feature_cache).lower() in ("false", "no"):
        args.feature_cache = "off"
    raise_if(
        not 0 <= args.max_bad_fraction <= 1,
        f"--max_bad_fraction {args.max_bad_fraction}: give a fraction of the records, 0 to 1.",
    )
    is_split = 0 <= args.eval_split < 1 or args.eval_split == int(args.eval_split) > 0
    raise_if(not is_split, f"--eval_split {args.eval_split}: give a fraction below 1 or a number of records.")
    check_pair(
        args.eval_data_path is not None and args.eval_split > 0, "eval_data_path", f"eval_split {args.eval_split}"
    )


def check_training(args):
    """Raise ValueError for flags of TrainingArguments that contradict each other."""
    check_numbers(args)
    check_pair(bool(args.bf16) and args.fp16, "bf16 True", "fp16 True")
    check_pair(
        args.tuning == "projector" and args.freeze_mm_mlp_adapter, "tuning projector", "freeze_mm_mlp_adapter True"
    )
    check_pair(
        args.mm_projector_lr is not None and args.freeze_mm_mlp_adapter,
        f"mm_projector_lr {args.mm_projector_lr}",
        "freeze_mm_mlp_adapter True",
    )
    check_pair(
        args.group_by_modality_length and args.train_sampling_strategy != "random",
        "group_by_modality_length True",
        f"train_sampling_strategy {args.train_sampling_strategy}",
    )
    raise_if(
        args.label_smoothing_factor != 0,
        f"--label_smoothing_factor {args.label_smoothing_factor}: the supervised loss has no smoothing; use 0.",
    )
    raise_if(
        args.mm_vision_tower_lr is not None and not (args.unfreeze_mm_vision_tower or args.lora_vision_tower),
        f"--mm_vision_tower_lr {args.mm_vision_tower_lr} needs --unfreeze_mm_vision_tower True.",
    )


def check_numbers(args):
    """Raise ValueError for numbers of TrainingArguments that are out of range."""
    for name in AT_LEAST_ONE:
        raise_if(getattr(args, name) < 1, f"--{name} {getattr(args, name)}: at least 1.")
    for name in NOT_NEGATIVE:
        value = getattr(args, name)
        raise_if(value is not None and value < 0, f"--{name} {value}: at least 0.")
    raise_if(
        args.max_steps <= 0 and args.num_train_epochs <= 0,
        f"--num_train_epochs {args.num_train_epochs:g}: more than 0, or give --max_steps.",
    )
    raise_if(not 0 <= args.lora_dropout < 1, f"--lora_dropout {args.lora_dropout}: a probability from 0 to below 1.")
    raise_if(args.max_steps == 0 or args.max_steps < -1, f"--max_steps {args.max_steps}: at least 1, or leave it out.")
    for kind in ("logging", "save"):
        strategy, steps = getattr(args, f"{kind}_strategy"), getattr(args, f"{kind}_steps")
        raise_if(
            getattr(strategy, "value", strategy) == "steps" and steps <= 0,
            f"--{kind}_steps {steps:g}: more than 0; --{kind}_strategy no turns it off.",
        )


def check_skipped_steps(args):
    """Raise ValueError for --max_skipped_steps where optimizer or engine cannot leave a step out."""
    flag = f"--max_skipped_steps {args.max_skipped_steps}"
    if args.max_skipped_steps == 0:
        return
    raise_if(args.fp16, f"{flag} with --fp16 True: its loss scaling leaves such steps out already; drop the flag.")
    optim = str(getattr(args.optim, "value", args.optim))
    raise_if(
        any(name in optim for name in UPDATES_ANYWAY),
        f"{flag} with --optim {optim}: it updates without a gradient, or before all gradients are known; use another.",
    )
    if not args.uses_deepspeed:
        return
    raise_if(args.zero_stage == 0, f"{flag} with DeepSpeed needs ZeRO: without it the engine leaves no step out.")
    overflow = args.deepspeed_plugin.deepspeed_config.get("bf16", {}).get("check_grad_overflow", True)
    raise_if(
        args.bf16 and args.zero_stage < 3 and not overflow,
        f'{flag} needs "check_grad_overflow": true under "bf16" in the DeepSpeed JSON; it is false.',
    )


def check_loggers(names):
    """Raise ValueError for a logger that is not installed, before a model is loaded for it."""
    from transformers.integrations import get_available_reporting_integrations

    missing = sorted(set(names) - set(get_available_reporting_integrations()))
    raise_if(
        bool(missing), f"--report_to {' '.join(missing)}: not installed; pip install {' '.join(missing)}, or drop it."
    )


def check_together(model_args, data_args, training_args):
    """Raise ValueError for flags of different groups that contradict each other, once `tuning` is resolved."""
    tuning = training_args.tuning
    check_training(training_args)
    for flag in MOE_FLAGS:
        value = getattr(model_args, flag)
        raise_if(
            value is not None and tuning != "moe",
            f"--{flag} {' '.join(map(str, value or []))} needs --moe_enable True; got --tuning {tuning}.",
        )
    check_pair(
        model_args.freeze_backbone and tuning not in ("projector", "full"), "freeze_backbone True", f"tuning {tuning}"
    )
    raise_if(
        tuning == "projector" and training_args.unfreeze_mm_vision_tower,
        "--tuning projector and --unfreeze_mm_vision_tower True contradict each other; --tuning full "
        "--freeze_backbone True trains connector and tower.",
    )
    raise_if(
        training_args.bits < 16 and not training_args.lora_enable,
        f"--bits {training_args.bits} needs --lora_enable True.",
    )
    check_checkpointing(tuning, training_args.auto_checkpointing, training_args.gradient_checkpointing_kwargs)
    check_packing(model_args, training_args)
    check_expert_parallel(model_args, training_args)
    trains_tower = training_args.unfreeze_mm_vision_tower or training_args.lora_vision_tower
    raise_if(
        data_args.feature_cache not in ("auto", "off") and trains_tower,
        f"--feature_cache {data_args.feature_cache} caches the features of a frozen tower, and --"
        f"{'unfreeze_mm' if training_args.unfreeze_mm_vision_tower else 'lora'}_vision_tower True trains it.",
    )
    evaluates = data_args.eval_data_path is not None or data_args.eval_split > 0
    strategy = getattr(training_args.eval_strategy, "value", training_args.eval_strategy)
    raise_if(strategy != "no" and not evaluates, f"--eval_strategy {strategy} needs --eval_data_path or --eval_split.")


def check_expert_parallel(model_args, training_args, num_ranks=None):
    """Raise ValueError for flags that contradict expert parallelism; for the model see split_experts.

    num_ranks: of a run that is only planned; default: those of this run.
    """
    flag = f"--ep_size {model_args.ep_size}"
    if model_args.ep_size == 1:
        return
    num_ranks = training_args.world_size if num_ranks is None else num_ranks
    raise_if(
        training_args.zero_stage not in (2, 3),
        f"{flag} needs ZeRO: give --deepspeed zero2 or zero3; got "
        f"{f'stage {training_args.zero_stage}' if training_args.uses_deepspeed else 'no --deepspeed'}.",
    )
    raise_if(
        training_args.tuning not in ("moe", "full"),
        f"{flag} divides trained experts among ranks; --tuning {training_args.tuning} trains none.",
    )
    for other in ("moe_drop_tokens", "use_residual"):
        check_pair(getattr(model_args, other), f"{other} True", flag.removeprefix("--"))
    # For a model that has experts their number is checked later, see split_experts.
    uneven = [number for number in model_args.num_experts or [] if number % model_args.ep_size]
    raise_if(
        training_args.tuning == "moe" and bool(uneven),
        f"{flag} and --num_experts {' '.join(map(str, uneven))}: so many ranks cannot divide them evenly.",
    )
    raise_if(
        num_ranks % model_args.ep_size > 0,
        f"{flag} with {num_ranks} rank{'s' * (num_ranks > 1)}: the ranks must be a multiple of that size.",
    )


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


def check_checkpointing(tuning, is_auto, kwargs):
    """Raise ValueError for reentrant gradient checkpointing with experts, or of some layers only.

    It runs the forward pass without gradient, and the balance loss would have none.
    """
    reentrant = isinstance(kwargs, dict) and kwargs.get("use_reentrant")
    for flag, is_set in (("tuning moe", tuning == "moe"), ("gradient_checkpointing auto", is_auto)):
        raise_if(
            is_set and reentrant,
            f'--{flag} needs gradient_checkpointing_kwargs={{"use_reentrant": false}}; got {json.dumps(kwargs)}.',
        )
