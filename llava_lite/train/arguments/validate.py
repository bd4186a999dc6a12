"""Check the flags of a run against each other."""

import json

from llava_lite.train.arguments.packing import check_packing
from llava_lite.train.arguments.refuse import check_pair, raise_if

# Flags for experts only.
MOE_FLAGS = ("train_modules", "num_experts", "moe_layers_idx")
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
