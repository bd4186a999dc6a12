"""Turn the command line of `python -m llava_lite.alias` into the program to run and its arguments."""

import argparse


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; whatever follows the program belongs to the program."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_lite.alias",
        usage="%(prog)s [--system NAME] SCRIPT [argument ...] | [--system NAME] -m MODULE [argument ...]",
        description="Run a program written for LLaVA, MoE-LLaVA or another system, unchanged, on llava_lite.",
        epilog="A MODULE that llava_lite has is its own; any other is looked for as a file below this directory.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--system",
        metavar="NAME",
        default="llava",
        help="whose program it is: llava (MoE-LLaVA's too, the default), llama_adapter, imagebind_llm or accessory",
    )
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT", help="file to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the program")
    return parser
