"""Turn `llava-lite VERB ...` into the program that does it; each is imported when it is called."""

import argparse
import os
import shlex
import sys
from importlib import import_module

from llava_lite import __version__

# Verb -> (module whose main(argv) does it, what it does).
VERBS = {
    "train": ("llava_lite.train.train", "run a training stage; flags as in scripts/v1_5, or a YAML file"),
    "check": (
        "llava_lite.commands.check",
        "look at every record and image of a run before any GPU time is spent",
    ),
    "data": ("llava_lite.commands.data", "rewrite records of another format: llava-lite data convert IN OUT.json"),
    "plan": ("llava_lite.train.plan", "estimate parameters and memory of a run: flags of train, and --num_devices N"),
    "chat": ("llava_lite.serve.cli", "talk to a model in the terminal: llava-lite chat MODEL --image-file x.jpg"),
    "convert": (
        "llava_lite.export.convert",
        "write a model as transformers' own LLaVA, or back, and check that it is equal",
    ),
    "push": ("llava_lite.share", "upload a finished folder to the Hub: llava-lite push FOLDER user/name"),
    "merge": (
        "llava_lite.export.merge",
        "fold LoRA, or a folder of what was trained, into a whole model and check it",
    ),
}
# Set by deepspeed, torchrun and accelerate in the processes that they start.
LAUNCHED = "WORLD_SIZE"


def build_parser():
    """Return the parser of the verb; what follows it belongs to the verb's own parser."""
    verbs = "\n".join(f"  {verb:9}{words}" for verb, (_, words) in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="llava-lite",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train, check and use LLaVA-family models, dense or with sparse experts.",
        epilog=f"verbs:\n{verbs}\n\n`llava-lite VERB --help` lists the flags of a verb.",
    )
    parser.add_argument("--version", action="version", version=f"llava-lite {__version__}")
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help=", ".join(VERBS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="flags of the verb")
    return parser


def main(argv=None):
    """Run a verb with the rest of the command line."""
    options = build_parser().parse_args(argv)
    if options.verb == "train" and LAUNCHED not in os.environ and not {"-h", "--help"} & set(options.arguments):
        print(launch_hint(options.arguments), file=sys.stderr)
    module, _ = VERBS[options.verb]
    run = import_module(module).main
    if options.verb == "train":
        # An error in the middle of a run is told with all that leads to it.
        return run(options.arguments)
    try:
        return run(options.arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"llava-lite {options.verb}: {error}", file=sys.stderr)
        return 1


def launch_hint(arguments):
    """Say that this is one process and how the same flags run on all devices."""
    # A YAML file stands first and may name a DeepSpeed config itself, which a flag would override.
    complete = "--deepspeed" in arguments or (arguments and not arguments[0].startswith("-"))
    flags = shlex.join(arguments if complete else ["--deepspeed", "zero2.json", *arguments])
    return (
        "llava-lite train: one process on one device. For all GPUs of this machine, or of a hostfile, with ZeRO:\n"
        f"  deepspeed --module llava_lite.train.train {flags}"
    )


if __name__ == "__main__":
    sys.exit(main())
