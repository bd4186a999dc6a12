"""Choose --packing where it is not given, and refuse what cannot be packed."""

import logging

from llava_lite.train.arguments.refuse import raise_if

logger = logging.getLogger(__name__)


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
