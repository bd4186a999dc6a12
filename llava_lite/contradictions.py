"""Refuse flags that contradict each other, both named, and fold the older ones into `tuning`."""

import json
import logging

logger = logging.getLogger(__name__)

TUNING_NAMES = ("projector", "full", "lora", "moe")
# The flag, true, that means each tuning in LLaVA's and MoE-LLaVA's scripts.
TUNING_FLAGS = {"tune_mm_mlp_adapter": "projector", "lora_enable": "lora", "moe_enable": "moe"}
# Flags that say something only about experts.
MOE_FLAGS = ("train_modules", "num_experts", "moe_layers_idx")
# Those of them that have a default, which many scripts repeat: told, not refused, where they have no effect.
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
)
LORA_FLAGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_bias", "lora_vision_tower")


def refuse(condition, message):
    """Raise ValueError with `message` if `condition` holds."""
    if condition:
        raise ValueError(message)


def refuse_pair(condition, first, second):
    """Raise ValueError naming two flags, with their values, that cannot both hold."""
    refuse(condition, f"--{first} and --{second} contradict each other; drop one.")


def fold_tuning(model_args, training_args):
    """Fold the older flags into `training_args.tuning`, and set them to what it means.

    Raises ValueError, the flags named, if they say two things.
    """
    owners = {flag: model_args if hasattr(model_args, flag) else training_args for flag in TUNING_FLAGS}
    said = {f"{flag} True": tuning for flag, tuning in TUNING_FLAGS.items() if getattr(owners[flag], flag)}
    if training_args.tuning is not None:
        said = {f"tuning {training_args.tuning}": training_args.tuning, **said}
    refuse(
        len(set(said.values())) > 1,
        f"{' and '.join(f'--{flag}' for flag in said)} contradict each other; say one --tuning of "
        f"{', '.join(TUNING_NAMES)}.",
    )
    training_args.tuning = next(iter(said.values()), "full")
    for flag, tuning in TUNING_FLAGS.items():
        setattr(owners[flag], flag, tuning == training_args.tuning)


def settle_packing(model_args, training_args):
    """Choose what a micro-batch is where no flag says it: records in one row, unless another flag needs padding."""
    args = training_args
    reason = needs_padding(model_args, args)
    if args.packing is None:
        args.packing = "none" if reason else "samples"
        if reason:
            logger.info("--packing none: %s.", reason)
    if args.packing == "tokens" and args.packing_tokens is None:
        args.packing_tokens = 4 * args.model_max_length


def needs_padding(model_args, training_args):
    """Return the flag that needs a padded row a record, and why; None if there is none."""
    if model_args.moe_count_padding and training_args.tuning == "moe":
        return "--moe_count_padding True routes padding, and packed rows have none"
    if training_args.parallelism_config is not None:
        return "--parallelism_config cuts rows where samples of a packed one do not end"
    if training_args.torch_compile:
        return "--torch_compile True compiles anew for every length, and packed rows have one of their own each"
    return None


def check_packing(model_args, training_args):
    """Raise ValueError for what does not go with --packing."""
    args = training_args
    reason = needs_padding(model_args, args)
    refuse(
        args.packing != "none" and reason is not None, f"--packing {args.packing} and {reason}; drop one of the flags."
    )
    if args.packing != "tokens":
        return
    refuse(args.packing_tokens < 1, f"--packing_tokens {args.packing_tokens}: a pack holds at least one token.")
    refuse(
        args.per_device_train_batch_size != 1,
        f"--packing tokens and --per_device_train_batch_size {args.per_device_train_batch_size}: a micro-batch is one "
        f"pack of up to {args.packing_tokens:,} tokens; say --per_device_train_batch_size 1, and --packing_tokens for "
        "its size.",
    )


def check_model(args):
    """Raise ValueError for what contradicts itself in ModelArguments."""
    from llava_lite.conversation import get_template

    get_template(args.version)
    for flag in ("chat_end_mark", "enable_thinking"):
        refuse(
            getattr(args, flag) is not None and args.version != "chat",
            f"--{flag} {getattr(args, flag)} is of the tokenizer's own chat template and --version is {args.version}; "
            "drop one, or say --version chat.",
        )
    least = min(args.num_experts or [4])
    refuse(
        not 1 <= args.top_k_experts <= least,
        f"--top_k_experts {args.top_k_experts} with --num_experts {least}: a token visits 1 to {least} experts.",
    )
    refuse(args.ep_size < 1, f"--ep_size {args.ep_size}: at least one rank holds the experts.")
    refuse(
        args.moe_second_expert_sampling != "never" and args.top_k_experts != 2,
        f"--moe_second_expert_sampling {args.moe_second_expert_sampling} draws the second of two experts and "
        f"--top_k_experts is {args.top_k_experts}; drop one.",
    )
    refuse_pair(args.train_modules is not None and args.freeze_backbone, "train_modules", "freeze_backbone True")


def check_data(args):
    """Raise ValueError for what contradicts itself in DataArguments."""
    from llava_lite.anyres import read_pinpoints
    from llava_lite.constants import ASPECT_RATIOS

    refuse(
        args.image_aspect_ratio not in (None, *ASPECT_RATIOS),
        f"unknown --image_aspect_ratio {args.image_aspect_ratio!r}; known: {', '.join(ASPECT_RATIOS)}.",
    )
    refuse_pair(
        args.image_grid_pinpoints is not None and args.image_aspect_ratio not in (None, "anyres"),
        f"image_grid_pinpoints {args.image_grid_pinpoints}",
        f"image_aspect_ratio {args.image_aspect_ratio}",
    )
    if args.image_grid_pinpoints is not None:
        # Whether they fit the tower is seen when it is known.
        read_pinpoints(args.image_grid_pinpoints, 1)
    # YAML reads off as False.
    if str(args.feature_cache).lower() in ("false", "no"):
        args.feature_cache = "off"
    refuse(
        not 0 <= args.max_bad_share <= 1, f"--max_bad_share {args.max_bad_share}: give a share of the records, 0 to 1."
    )
    is_split = 0 <= args.eval_split < 1 or args.eval_split == int(args.eval_split) > 0
    refuse(not is_split, f"--eval_split {args.eval_split}: give a share below 1 or a number of records.")
    refuse_pair(
        args.eval_data_path is not None and args.eval_split > 0, "eval_data_path", f"eval_split {args.eval_split}"
    )


def check_training(args):
    """Raise ValueError for what contradicts itself in TrainingArguments."""
    check_numbers(args)
    refuse_pair(bool(args.bf16) and args.fp16, "bf16 True", "fp16 True")
    refuse_pair(
        args.tuning == "projector" and args.freeze_mm_mlp_adapter, "tuning projector", "freeze_mm_mlp_adapter True"
    )
    refuse_pair(
        args.mm_projector_lr is not None and args.freeze_mm_mlp_adapter,
        f"mm_projector_lr {args.mm_projector_lr}",
        "freeze_mm_mlp_adapter True",
    )
    refuse_pair(
        args.group_by_modality_length and args.train_sampling_strategy != "random",
        "group_by_modality_length True",
        f"train_sampling_strategy {args.train_sampling_strategy}",
    )
    refuse(
        args.label_smoothing_factor != 0,
        f"--label_smoothing_factor {args.label_smoothing_factor}: the loss at learned tokens has no smoothing; use 0.",
    )
    refuse(
        args.mm_vision_tower_lr is not None and not (args.unfreeze_mm_vision_tower or args.lora_vision_tower),
        f"--mm_vision_tower_lr {args.mm_vision_tower_lr} needs --unfreeze_mm_vision_tower True.",
    )


def check_numbers(args):
    """Raise ValueError for numbers of TrainingArguments that no run can have."""
    for name in AT_LEAST_ONE:
        refuse(getattr(args, name) < 1, f"--{name} {getattr(args, name)}: at least 1.")
    for name in NOT_NEGATIVE:
        value = getattr(args, name)
        refuse(value is not None and value < 0, f"--{name} {value}: at least 0.")
    refuse(
        args.max_steps <= 0 and args.num_train_epochs <= 0,
        f"--num_train_epochs {args.num_train_epochs:g}: more than 0, or give --max_steps.",
    )
    refuse(not 0 <= args.lora_dropout < 1, f"--lora_dropout {args.lora_dropout}: a share, 0 or more and below 1.")
    refuse(args.max_steps == 0 or args.max_steps < -1, f"--max_steps {args.max_steps}: at least 1, or leave it out.")
    for kind in ("logging", "save"):
        strategy, steps = getattr(args, f"{kind}_strategy"), getattr(args, f"{kind}_steps")
        refuse(
            getattr(strategy, "value", strategy) == "steps" and steps <= 0,
            f"--{kind}_steps {steps:g}: more than 0; --{kind}_strategy no turns it off.",
        )


def check_loggers(names):
    """Raise ValueError for a logger that is not installed, before a model is loaded for it."""
    from transformers.integrations import get_available_reporting_integrations

    missing = sorted(set(names) - set(get_available_reporting_integrations()))
    refuse(
        bool(missing), f"--report_to {' '.join(missing)}: not installed; pip install {' '.join(missing)}, or drop it."
    )


def check_together(model_args, data_args, training_args):
    """Raise ValueError for contradictions between the three groups, both flags named; `tuning` is folded by now."""
    tuning = training_args.tuning
    check_training(training_args)
    for flag in MOE_FLAGS:
        value = getattr(model_args, flag)
        refuse(
            value is not None and tuning != "moe",
            f"--{flag} {' '.join(map(str, value or []))} needs --moe_enable True; got --tuning {tuning}.",
        )
    refuse_pair(model_args.freeze_backbone and tuning in ("lora", "moe"), "freeze_backbone True", f"tuning {tuning}")
    refuse(
        tuning == "projector" and training_args.unfreeze_mm_vision_tower,
        "--tuning projector and --unfreeze_mm_vision_tower True contradict each other; --tuning full "
        "--freeze_backbone True trains connector and tower.",
    )
    refuse(training_args.bits < 16 and tuning != "lora", f"--bits {training_args.bits} needs --lora_enable True.")
    check_checkpointing(tuning, training_args.auto_checkpointing, training_args.gradient_checkpointing_kwargs)
    check_packing(model_args, training_args)
    check_expert_parallel(model_args, training_args)
    trains_tower = training_args.unfreeze_mm_vision_tower or training_args.lora_vision_tower
    refuse(
        data_args.feature_cache not in ("auto", "off") and trains_tower,
        f"--feature_cache {data_args.feature_cache} keeps the features of a frozen tower, and --"
        f"{'unfreeze_mm' if training_args.unfreeze_mm_vision_tower else 'lora'}_vision_tower True trains it.",
    )
    evaluates = data_args.eval_data_path is not None or data_args.eval_split > 0
    strategy = getattr(training_args.eval_strategy, "value", training_args.eval_strategy)
    refuse(strategy != "no" and not evaluates, f"--eval_strategy {strategy} needs --eval_data_path or --eval_split.")


def check_expert_parallel(model_args, training_args, num_ranks=None):
    """Raise ValueError for what does not go with experts that several ranks share; of the model, see split_experts.

    num_ranks: of a run that is only planned; default: those that this process is one of.
    """
    said = f"--ep_size {model_args.ep_size}"
    if model_args.ep_size == 1:
        return
    num_ranks = training_args.world_size if num_ranks is None else num_ranks
    refuse(
        training_args.zero_stage not in (2, 3),
        f"{said} needs ZeRO: give --deepspeed zero2.json or zero3.json; got "
        f"{f'stage {training_args.zero_stage}' if training_args.uses_deepspeed else 'no --deepspeed'}.",
    )
    refuse(
        training_args.tuning not in ("moe", "full"),
        f"{said} shares out experts that train; --tuning {training_args.tuning} trains none.",
    )
    for flag in ("moe_drop_tokens", "use_residual"):
        refuse_pair(getattr(model_args, flag), f"{flag} True", said.removeprefix("--"))
    # Of a model that has experts their number is seen later, see split_experts.
    uneven = [number for number in model_args.num_experts or [] if number % model_args.ep_size]
    refuse(
        training_args.tuning == "moe" and bool(uneven),
        f"{said} and --num_experts {' '.join(map(str, uneven))}: so many ranks cannot share them evenly.",
    )
    refuse(
        num_ranks % model_args.ep_size > 0,
        f"{said} with {num_ranks} rank{'s' * (num_ranks > 1)}: the ranks must come in whole groups of that size.",
    )


def without_effect(model_args, training_args):
    """Return the flags, with their values, that say something this run does not ask about, and why it does not."""
    tuning = training_args.tuning
    idle = []
    if tuning != "moe":
        idle += [(model_args, MOE_SETTINGS + CAPACITY_FLAGS, f"--tuning {tuning} makes no experts")]
    elif not model_args.moe_drop_tokens:
        # Said or not: a model that has experts may have its own choice.
        reason = "without --moe_drop_tokens True no token is dropped"
        reason += (
            ""
            if "moe_drop_tokens" in (model_args.said or ())
            else ", unless the model's own experts drop some already"
        )
        idle += [(model_args, CAPACITY_FLAGS, reason)]
    if tuning != "lora":
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
    """Refuse reentrant gradient checkpointing with experts, and of some layers only.

    It runs the forward pass without gradient and the balance loss goes silent.
    """
    reentrant = isinstance(kwargs, dict) and kwargs.get("use_reentrant")
    for flag, is_set in (("tuning moe", tuning == "moe"), ("gradient_checkpointing auto", is_auto)):
        refuse(
            is_set and reentrant,
            f'--{flag} needs gradient_checkpointing_kwargs={{"use_reentrant": false}}; got {json.dumps(kwargs)}.',
        )
