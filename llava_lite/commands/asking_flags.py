"""Declare the flags that all commands have that ask a model many questions: `eval` and `answer`."""

import argparse

from llava_lite.commands.parser import CommandParser


def add_asking_flags(parser: CommandParser, max_new_tokens: str = "the benchmark's own") -> None:
    """Declare how the model is loaded, how answers are generated, and who asks which questions.

    max_new_tokens: the default, for the help. Flags that are not given are None: the benchmark decides.
    """
    parser.add_argument("--model-base", help="base of a directory that holds only what was trained")
    parser.add_argument("--revision", help="branch, tag or commit of the model's repository (default: main)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: the GPU where there is one)")
    parser.add_argument("--load-8bit", action="store_true", help="quantise to 8 bit (bitsandbytes)")
    parser.add_argument("--load-4bit", action="store_true", help="quantise to 4 bit (bitsandbytes)")
    parser.add_argument("--batch-size", type=at_least_1, default=1, help="questions asked at once (default: 1)")
    parser.add_argument("--conv-mode", help="prompt format (default: the one that trained the model)")
    parser.add_argument("--temperature", type=float, help="0 for greedy decoding (default: 0)")
    parser.add_argument(
        "--top-p", type=float, help="sample from the most probable tokens whose probabilities add up to this"
    )
    parser.add_argument("--num-beams", type=at_least_1, help="beams of beam search (default: 1)")
    parser.add_argument("--max-new-tokens", type=at_least_1, help=f"longest answer (default: {max_new_tokens})")
    parser.add_argument("--num-chunks", type=at_least_1, default=1, help="processes that share the questions")
    parser.add_argument("--chunk-idx", type=int, help="which of them this is, from 0; without it, join all chunks")
    parser.add_argument("--overwrite", action="store_true", help="delete earlier answers and begin again")


def at_least_1(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)
