"""Estimate what a run needs on each device, from shapes only: memory, tokens and optimizer steps."""

import math
from dataclasses import replace

from llava_lite.train.build import add_experts
from llava_lite.train.estimate.memory import estimate_memory, get_offload, longest_batch, memory_lines
from llava_lite.train.estimate.scale import Cluster, Work, count_step, get_hours
from llava_lite.train.tuning import choose_what_trains, compute_dtype, loading_dtype

# What a pack of --packing tokens is full of, counted on lengths like mix665k's; see data/packing.py.
PACK_FRACTION = 0.97


def plan_run(model, dataset, training_args, num_checkpointed=0, ep_size=1):
    """Return the lines that a run prints before it starts: batch, steps, memory a rank in its longest batch.

    num_checkpointed: decoder layers that are recomputed. ep_size: ranks among which the experts are divided later.
    """
    args = training_args
    num_micro = args.world_size * args.gradient_accumulation_steps
    num_tokens = longest_batch(dataset, args)
    unit = f"packs of {args.packing_tokens:,} tokens" if args.packing == "tokens" else "records"
    size = 1 if args.packing == "tokens" else args.per_device_train_batch_size
    supervised_fraction = dataset.annotations.supervised_fraction if hasattr(dataset, "annotations") else 1.0
    where = {"offload": get_offload(args), "device_type": args.device.type, "ep_size": ep_size}
    memory = estimate_memory(model, args, num_tokens, num_tokens * supervised_fraction, num_checkpointed, **where)
    head = [
        f"{args.world_size} ranks x {size} {unit} x {args.gradient_accumulation_steps} accumulated = "
        f"{num_micro * size} a step, {get_num_steps(dataset, args):,} steps, ZeRO-{args.zero_stage}",
        f"estimated memory of a rank in its longest batch ({num_tokens:,} tokens):",
    ]
    tail = [image_line(dataset.layout, args.model_max_length)] if dataset.layout.is_anyres else []
    return "\n".join(head + memory_lines(memory) + tail)


def get_num_steps(dataset, args):
    """Return the optimizer steps of a run; with packs of tokens, about."""
    if args.max_steps > 0:
        return args.max_steps
    batch = args.world_size * args.gradient_accumulation_steps
    if args.packing == "tokens":
        return get_run_steps(math.ceil(dataset.lengths.sum() / args.packing_tokens / PACK_FRACTION), batch, args)
    return get_run_steps(len(dataset), batch * args.per_device_train_batch_size, args)


def image_line(layout, max_length):
    """Return the line on how long images are, and whether the longest fits."""
    if not layout.in_text:
        return "an image takes no token of the text"
    least = layout.num_tokens() if not layout.is_anyres else layout.num_features
    length = f"{layout.most_tokens:,}" if least == layout.most_tokens else f"up to {layout.most_tokens:,}"
    line = f"an image is {length} tokens"
    if layout.most_tokens < max_length:
        return line
    return f"{line}: more than --model_max_length {max_length:,}; records with such an image are bad records"


def get_run_steps(num_records, batch, args):
    """Return the number of optimizer steps."""
    steps = math.ceil(num_records / batch)
    if args.dataloader_drop_last:
        num_micro = num_records // (batch // args.gradient_accumulation_steps)
        steps = math.ceil(num_micro / args.gradient_accumulation_steps)
    return math.ceil(steps * args.num_train_epochs)


def empty_model(model_args, data_args, training_args):
    """Return the model of a run without weights: only configs are read, so that a laptop can plan for a cluster."""
    import torch

    from llava_lite.checkpoints.source import Checkpoint
    from llava_lite.configuration import get_text_fields
    from llava_lite.model import model_class_for
    from llava_lite.tower_config import get_tower_fields

    config = Checkpoint.of_flag(model_args.model_name_or_path, training_args.cache_dir).config
    model_class = model_class_for(config.model_type)
    if not config.model_type.startswith("llava_"):
        fields = get_text_fields(config) | get_tower_fields(model_args.vision_tower)
        config = model_class.config_class(**fields)
    for key, value in (model_args.config_choices() | data_args.config_choices()).items():
        setattr(config, key, value)
    has_experts = getattr(config, "moe", None) is not None
    if training_args.tuning == "moe" and not has_experts:
        config.moe = model_args.moe_config()
    with torch.device("meta"):
        model = model_class(config).to(loading_dtype(training_args))
    if has_experts:
        add_experts(model, model_args, training_args)
    return choose_what_trains(model, model_args, training_args)


def traffic_lines(model, args, options, num_tokens):
    """Return the lines on what a device sends in a step and how long a pass takes; computed, see scale.py."""
    cluster = Cluster(options.num_devices, peak_flops=options.peak_tflops * 1e12, mfu=options.mfu)
    if options.bandwidth is not None:
        cluster = replace(cluster, node_bandwidth=options.bandwidth * 1e9, network_bandwidth=options.bandwidth * 1e9)
    tokens, micro_batch = options.record_tokens, args.per_device_train_batch_size
    if args.packing == "tokens":
        micro_batch = num_tokens / tokens
    work = Work(options.num_records, tokens, tokens, int(model.config.has_vision_tower), 0)
    shape = micro_batch, args.gradient_accumulation_steps, compute_dtype(args).itemsize
    step = count_step(model, work, args.zero_stage, cluster, *shape)
    line = f"a device sends {step.sent_bytes / 1e9:.3f} GB a step (computed)"
    if options.num_records is None:
        return line
    best, worst = get_hours(step, work)
    return (
        f"{line}, {step.send_s:.3f} s beside {step.work_s:.3f} s of compute at {options.mfu:.0%} of the peak "
        f"(computed)\n{options.num_records:,} records: {best:.2f} hours with communication hidden by compute, "
        f"{worst:.2f} without"
    )
