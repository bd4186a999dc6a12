"""Turn the flags of `llava-lite serve` into a server: OpenAI's chat API for one model."""

import argparse

from llava_lite.commands.asking_flags import at_least_1
from llava_lite.commands.parser import CommandParser


def build_parser():
    """Return the parser of `llava-lite serve`."""
    parser = CommandParser(command="serve", description="Answer requests in the form of OpenAI's chat API.")
    parser.add_argument("model", metavar="MODEL", help="directory or hub id of the model")
    parser.add_argument("--model-base", help="base of a directory that holds only what was trained")
    parser.add_argument("--revision", help="branch, tag or commit of the model's repository (default: main)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: the GPU where there is one)")
    parser.add_argument("--load-8bit", action="store_true", help="quantise to 8 bit (bitsandbytes)")
    parser.add_argument("--load-4bit", action="store_true", help="quantise to 4 bit (bitsandbytes)")
    parser.add_argument("--conv-mode", help="prompt format (default: the one that trained the model)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=port, default=8000, help="port; 0 for any that is free (default: 8000)")
    parser.add_argument("--api-key", help="key that clients must send (default: LLAVA_LITE_API_KEY, else none)")
    parser.add_argument("--served-model-name", help="name of the model in requests (default: that of its directory)")
    parser.add_argument(
        "--max-batch", type=at_least_1, default=32, help="answers that are generated side by side (default: 32)"
    )
    parser.add_argument(
        "--max-queue", type=at_least_1, default=128, help="answers that may wait; more are refused (default: 128)"
    )
    parser.add_argument(
        "--inexact",
        action="store_true",
        help="keep an answer of a batch also where it may differ, by rounding, from the one alone; faster",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=at_least_1,
        default=512,
        help="longest answer where a request names none (default: 512)",
    )
    parser.add_argument("--timeout", type=seconds, default=300.0, help="seconds a request may take (default: 300)")
    parser.add_argument(
        "--allow-host",
        action="append",
        type=host,
        default=[],
        metavar="HOST[:PORT]",
        help="host from which images are fetched, by its full name; may be repeated (default: none)",
    )
    parser.add_argument("--max-images", type=at_least_1, default=8, help="images of a request (default: 8)")
    parser.add_argument(
        "--max-image-bytes", type=at_least_1, default=20 * 2**20, help="bytes of an image's file (default: 20971520)"
    )
    parser.add_argument(
        "--max-image-pixels", type=at_least_1, default=40_000_000, help="pixels of an image (default: 40000000)"
    )
    return parser


def port(text: str) -> int:
    """Read the number of a port."""
    if not (text.isascii() and text.isdecimal()) or not 0 <= int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: a whole number from 0 to 65535")
    return int(text)


def seconds(text: str) -> float:
    """Read a time above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no time: a number of seconds above 0")
    return number


def host(text: str) -> str:
    """Read a host from which images may be fetched."""
    # Imported here: of the other commands none needs it.
    from llava_lite.serve.api.hosts import read_host

    try:
        return read_host(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    except ImportError as error:
        message = (
            f"{text!r} has letters beyond ASCII, for which {error.name} is needed: pip install 'llava-lite[serve]'"
        )
        raise argparse.ArgumentTypeError(message) from error


def main(argv=None) -> int:
    """Serve until the process is stopped; return 0."""
    flags = build_parser().parse_args(argv)
    # Imported here: a wrong flag is answered without torch.
    from llava_lite.serve.api.server import serve

    serve(flags)
    return 0
