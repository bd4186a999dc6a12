"""Turn the flags of `llava-lite plan` that are not those of a run into options."""

import argparse
import math

from llava_lite.commands.parser import CommandParser


def build_parser():
    """Return the parser of what `plan` adds to the flags of `train`."""
    parser = CommandParser(
        prog="llava-lite plan",
        command="plan",
        usage="llava-lite plan --model_name_or_path MODEL [flags of llava-lite train] [those below]",
        description="Estimate parameters, memory and time of a run from configs alone.",
        epilog="`llava-lite train --help` shows the flags of a run.",
    )
    parser.add_argument(
        "--num_devices", "--num-devices", type=above_zero(int), default=1, metavar="N", help="ranks (default: 1)"
    )
    parser.add_argument(
        "--ep_size", "--ep-size", type=above_zero(int), default=1, help="of them, those that share experts"
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
    """Return a reader of numbers above 0 and up to `most`, for a flag; with others a plan divides, or lies."""

    def read(text):
        number = kind(text)
        if not 0 < number <= most:
            raise argparse.ArgumentTypeError(
                f"{text}: give more than 0" + (f", at most {most}" if most < math.inf else "")
            )
        return number

    read.__name__ = kind.__name__
    return read
