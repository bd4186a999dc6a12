"""Estimate what a run needs of each device, from shapes alone: memory, tokens and optimizer steps."""

import math
import os
import sys

from llava_lite.commands.plan import build_parser
from llava_lite.train.build import add_experts
from llava_lite.train.memory import (
    estimate_memory,
    gib,
    longest_batch,
    memory_lines,
    offload_of_run,
    offloaded,
)
from llava_lite.train.scale import Cluster, Step, Work, hours_of, sent_bytes, weights_of
from llava_lite.train.throughput import step_flops
from llava_lite.train.tuning import choose_what_trains, compute_dtype, describe, loading_dtype

# What a pack of --packing tokens is full of, counted on lengths like mix665k's; see data/packing.py.
PACK_SHARE = 0.97


def plan_of_run(model, dataset, training_args, ep_size=1):
    """Return the lines that a run prints before it starts: batch, steps, memory a rank in its longest batch.

    ep_size: ranks that are about to share the experts.
    """
    args = training_args
    num_micro = args.world_size * args.gradient_accumulation_steps
    num_tokens = longest_batch(dataset, args)
    unit = f"packs of {args.packing_tokens:,} tokens" if args.packing == "tokens" else "records"
    size = 1 if args.packing == "tokens" else args.per_device_train_batch_size
    annotations, learned_share = getattr(dataset, "annotations", None), 1.0
    if annotations is not None:
        learned_share = annotations.learned_share
    where = {"offload": offload_of_run(args), "device_type": args.device.type, "ep_size": ep_size}
    memory = estimate_memory(model, args, num_tokens, num_tokens * learned_share, num_checkpointed(model), **where)
    head = [
        f"{args.world_size} ranks x {size} {unit} x {args.gradient_accumulation_steps} accumulated = "
        f"{num_micro * size} a step, {num_steps_of(dataset, args):,} steps, ZeRO-{args.zero_stage}",
        f"estimated memory of a rank in its longest batch ({num_tokens:,} tokens):",
    ]
    tail = [picture_line(dataset.layout, args.model_max_length)] if dataset.layout.is_anyres else []
    return "\n".join(head + memory_lines(memory) + tail)


def num_checkpointed(model):
    """Return how many decoder layers are checkpointed now; None where that is only to come."""
    return sum(getattr(layer, "gradient_checkpointing", False) for layer in model.get_model().layers) or None


def num_steps_of(dataset, args):
    """Return the optimizer steps of a run; with packs of tokens, about."""
    if args.max_steps > 0:
        return args.max_steps
    batch = args.world_size * args.gradient_accumulation_steps
    if args.packing == "tokens":
        return steps_of_run(math.ceil(dataset.lengths.sum() / args.packing_tokens / PACK_SHARE), batch, args)
    return steps_of_run(len(dataset), batch * args.per_device_train_batch_size, args)


def picture_line(layout, max_length):
    """Return the line that says how long pictures are, and whether the longest fits."""
    least = layout.num_tokens() if not layout.is_anyres else layout.num_features
    length = f"{layout.most_tokens:,}" if least == layout.most_tokens else f"up to {layout.most_tokens:,}"
    line = f"a picture is {length} tokens"
    if layout.most_tokens < max_length:
        return line
    return f"{line}: more than --model_max_length {max_length:,} has room for; records with such a picture are refused"


def steps_of_run(num_records, batch, args):
    """Return the number of optimizer steps."""
    if args.max_steps > 0:
        return args.max_steps
    steps = math.ceil(num_records / batch)
    if args.dataloader_drop_last:
        num_micro = num_records // (batch // args.gradient_accumulation_steps)
        steps = math.ceil(num_micro / args.gradient_accumulation_steps)
    return math.ceil(steps * args.num_train_epochs)


def empty_model(model_args, data_args, training_args):
    """Return the model of a run without weights: only configs are read, so that a laptop can plan for a cluster."""
    import torch

    from llava_lite.companions import refuse_missing_model
    from llava_lite.model import model_class_for
    from llava_lite.model.assemble import text_fields, tower_fields
    from llava_lite.model.builder import config_of

    refuse_missing_model(model_args.model_name_or_path)
    stock = config_of(model_args.model_name_or_path, {"cache_dir": training_args.cache_dir})
    model_class = model_class_for(stock.model_type)
    config = stock
    if not stock.model_type.startswith("llava_"):
        fields = text_fields(stock) | tower_fields(model_args.vision_tower)
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
    """Return what a device sends in a step and how long a pass takes; computed, see scale.py."""
    num_micro, links = args.gradient_accumulation_steps, Cluster(num_devices=options.num_devices)
    wire_bytes = compute_dtype(args).itemsize
    sent = sum(sent_bytes(weights_of(model), args.zero_stage, options.num_devices, num_micro, wire_bytes).values())
    line = f"a device sends {sent / 1e9:.3f} GB a step (computed)"
    if options.num_records is None:
        return line
    records = num_micro * (
        args.per_device_train_batch_size if args.packing != "tokens" else num_tokens / options.record_tokens
    )
    tokens = records * options.record_tokens
    flops = step_flops(model).of_batch(tokens, tokens, records if model.config.has_vision_tower else 0)
    bandwidth = links.bandwidth if options.bandwidth is None else options.bandwidth * 1e9
    work_s, send_s = flops / (options.peak_tflops * 1e12 * options.mfu), sent / bandwidth
    step = Step(records / num_micro, num_micro, records * options.num_devices, sent, work_s, send_s)
    best, worst = hours_of(step, Work(options.num_records, options.record_tokens, 0, 0, 0))
    return (
        f"{line}, {send_s:.3f} s beside {work_s:.3f} s of work at {options.mfu:.0%} of the peak (computed)\n"
        f"{options.num_records:,} records: {best:.2f} hours with sending hidden behind work, {worst:.2f} without"
    )


def of_a_device(flags):
    """Return the flags by which a machine without a device plans for those that have bfloat16, if `flags` let it."""
    from llava_lite.flags import machine_has, open_yaml

    if machine_has("device"):
        return []
    said = {flag.lstrip("-").partition("=")[0] for flag in open_yaml(flags)}
    return ["--use_cpu", "True", *([] if {"bf16", "fp16"} & said else ["--bf16", "True"])]


def main(argv=None):
    """Print the plan of a run: the flags of `llava-lite train`, and those below. Reads configs, no weights.

    In bfloat16, unless a flag says another precision.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from llava_lite.arguments import parse_args, read_deepspeed
    from llava_lite.contradictions import check_expert_parallel
    from llava_lite.train.memory import GIB, USABLE_SHARE, fewest_checkpointed

    argv = list(sys.argv[1:] if argv is None else argv)
    own = build_parser()
    options, flags = own.parse_known_args(argv)
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    model_args, data_args, args = parse_args(flags + of_a_device(flags), command="plan", more_flags=own.flags.values())
    # Kept from parse_args, which knows of one rank only.
    model_args.ep_size = options.ep_size
    check_expert_parallel(model_args, args, options.num_devices)
    # With ZeRO-3 in the flags transformers would build a model that is split over ranks, which there are none of.
    unset_hf_deepspeed_config()
    model = empty_model(model_args, data_args, args)
    print(describe(model, args))
    packed = args.packing == "tokens"
    num_tokens = args.packing_tokens if packed else args.per_device_train_batch_size * args.model_max_length
    offload = offloaded(read_deepspeed(args.deepspeed))

    def memory_with(number):
        return estimate_memory(
            model, args, num_tokens, num_tokens, number, options.num_devices, offload, options.ep_size
        )

    num_layers = len(model.get_model().layers)
    chosen = num_layers if args.gradient_checkpointing else 0
    if args.auto_checkpointing:
        budget = USABLE_SHARE["cuda"] * options.device_memory * GIB
        chosen = fewest_checkpointed(num_layers, lambda number: memory_with(number).total, budget)
    records = f"{args.per_device_train_batch_size} records of {args.model_max_length}"
    print(
        f"\n{options.num_devices} devices, ZeRO-{args.zero_stage}, {num_tokens:,} tokens in a micro-batch "
        f"({'a pack' if packed else records}, all learned), {chosen} of {num_layers} layers checkpointed:"
    )
    print("\n".join(memory_lines(memory_with(chosen))))
    if args.auto_checkpointing:
        print(f"without checkpointing {gib(memory_with(0).total)}, room for {gib(budget)}")
    print(traffic_lines(model, args, options, num_tokens))
    if options.ep_size > 1:
        print(
            "traffic is that of whole experts on every rank: with --ep_size tokens travel in place of their gradients"
        )
    if offload:
        print(f"in the memory of the host, or on its disks: {' and '.join(sorted(offload))}")
    if model.config.has_vision_tower:
        print(picture_line(model.config.picture_layout, args.model_max_length))
