"""Turn the flags of a run, and those of `llava-lite plan`, into the plan that is printed."""

import argparse
import math
import os
import sys

from llava_lite.commands.parser import CommandParser


def build_parser():
    """Return the parser of what `plan` adds to the flags of `train`."""
    parser = CommandParser(
        command="plan",
        usage="llava-lite plan --model_name_or_path MODEL [flags of llava-lite train] [those below]",
        description="Estimate parameters, memory and time of a run from configs alone.",
        epilog="`llava-lite train --help` shows the flags of a run.",
    )
    parser.add_argument(
        "--num_devices", "--num-devices", type=above_zero(int), default=1, metavar="N", help="ranks (default: 1)"
    )
    parser.add_argument(
        "--ep_size",
        "--ep-size",
        type=above_zero(int),
        default=1,
        help="ranks that divide the experts of a layer among them",
    )
    parser.add_argument(
        "--device_memory", "--device-memory", type=above_zero(float), default=80, metavar="GIB",
        help="memory of a device, for --gradient_checkpointing auto (default: 80)",
    )  # fmt: skip
    parser.add_argument(
        "--num_records", "--num-records", type=above_zero(int), help="records of a pass: print its hours too"
    )
    parser.add_argument(
        "--record_tokens", "--record-tokens", type=above_zero(float), default=786, help="of one, its images included"
    )
    parser.add_argument(
        "--mfu",
        type=above_zero(float, 1),
        default=0.4,
        help="utilisation that you expect (default: %(default)s)",
    )
    parser.add_argument("--peak_tflops", "--peak-tflops", type=above_zero(float), default=989, help="of a device")
    parser.add_argument(
        "--bandwidth", type=above_zero(float), metavar="GB_S",
        help="that a device sends at (default: 300 in a node of 8, 40 out of it)",
    )  # fmt: skip
    return parser


def above_zero(kind, most=math.inf):
    """Return a reader of numbers above 0 and up to `most`, for a flag; a plan cannot compute with others."""

    def read(text):
        number = kind(text)
        if not 0 < number <= most:
            raise argparse.ArgumentTypeError(
                f"{text}: give more than 0" + (f", at most {most}" if most < math.inf else "")
            )
        return number

    read.__name__ = kind.__name__
    return read


def of_a_device(flags):
    """Return the flags with which a machine without a device plans for devices with bfloat16."""
    from llava_lite.train.arguments.legacy import machine_has, open_yaml

    if machine_has("device"):
        return []
    given = {flag.lstrip("-").partition("=")[0] for flag in open_yaml(flags)}
    return ["--use_cpu", "True", *([] if {"bf16", "fp16"} & given else ["--bf16", "True"])]


def main(argv=None):
    """Print the plan of a run from its flags and those of `build_parser`. Reads configs, no weights.

    In bfloat16, unless a flag gives another precision.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    own = build_parser()
    options, flags = own.parse_known_args(argv)
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from llava_lite.train.arguments.parse import parse_args
    from llava_lite.train.arguments.validate import check_expert_parallel
    from llava_lite.train.deepspeed.files import read_deepspeed
    from llava_lite.train.estimate.checkpointing import USABLE_FRACTION, count_checkpointed
    from llava_lite.train.estimate.memory import GIB, estimate_memory, gib, memory_lines, offloaded
    from llava_lite.train.estimate.plan import empty_model, image_line, traffic_lines
    from llava_lite.train.tuning import describe

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

    num_layers, budget = len(model.get_model().layers), USABLE_FRACTION["cuda"] * options.device_memory * GIB
    chosen = count_checkpointed(args, num_layers, lambda number: memory_with(number).total, budget)
    records = f"{args.per_device_train_batch_size} records of {args.model_max_length}"
    print(
        f"\n{options.num_devices} devices, ZeRO-{args.zero_stage}, {num_tokens:,} tokens in a micro-batch "
        f"({'a pack' if packed else records}, all supervised), {chosen} of {num_layers} layers checkpointed:"
    )
    print("\n".join(memory_lines(memory_with(chosen))))
    if args.auto_checkpointing:
        print(f"without checkpointing {gib(memory_with(0).total)}, room for {gib(budget)}")
    print(traffic_lines(model, args, options, num_tokens))
    if options.ep_size > 1:
        print("traffic is computed for all experts on every rank; with --ep_size tokens are sent instead of gradients")
    if offload:
        print(f"in the memory of the host, or on its disks: {' and '.join(sorted(offload))}")
    if model.config.has_vision_tower:
        print(image_line(model.config.image_layout, args.model_max_length))
