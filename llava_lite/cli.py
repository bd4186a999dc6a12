"""Turn `llava-lite VERB ...` into the program that does it; each is imported when it is called."""

import argparse
import difflib
import sys
from importlib import import_module

from llava_lite import __version__
from llava_lite.commands.parser import in_flags, sentence_of
from llava_lite.commands.train import asks_for_help, main_page

# Verbs whose flags can be read, and wrong ones answered, before torch is imported for what they do.
PARSERS = {verb: f"llava_lite.commands.{verb}" for verb in ("chat", "convert", "merge", "plan", "push")}
PARSERS["check"] = "llava_lite.commands.check_flags"
# Those whose command line may hold flags of `train` too.
WITH_FLAGS_OF_TRAIN = ("check", "plan")
# Verb -> (module whose main(argv) does it, what it does).
VERBS = {
    "train": ("llava_lite.train.train", "run a training stage; flags as in scripts/v1_5, or a YAML file"),
    "check": ("llava_lite.commands.check", "look through data and images before any GPU time is spent"),
    "data": ("llava_lite.commands.data", "rewrite records of another format: llava-lite data convert IN OUT.json"),
    "plan": ("llava_lite.train.plan", "estimate parameters and memory of a run: flags of train, and --num_devices N"),
    "chat": ("llava_lite.serve.cli", "talk to a model in the terminal: llava-lite chat MODEL --image-file x.jpg"),
    "convert": (
        "llava_lite.export.convert",
        "write a model as transformers' own LLaVA, or back, and check that it is equal",
    ),
    "push": ("llava_lite.share", "upload a finished directory to the Hub: llava-lite push DIRECTORY user/name"),
    "merge": (
        "llava_lite.export.merge",
        "fold LoRA, or a directory of what was trained, into a whole model and check it",
    ),
}
# What other programs call a verb.
OTHER_VERBS = {
    "train": "finetune fine-tune pretrain fit sft",
    "check": "validate verify lint data inspect",
    "plan": "estimate memory",
    "chat": "run serve infer inference generate ask talk demo cli reply",
    "convert": "export",
    "push": "upload share",
    "merge": "fuse fold merge_lora merge-lora",
}
EVALUATION = ("eval", "evaluate", "test", "benchmark", "score")
EXIT_USAGE, EXIT_INTERRUPTED = 2, 130


def build_parser():
    """Return the parser of the verb; what follows it belongs to the verb's own parser."""
    verbs = "\n".join(f"  {verb:9}{words}" for verb, (_, words) in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="llava-lite",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="llava-lite VERB ...",
        description="Train, check and use LLaVA-family models, dense or with sparse experts.",
        epilog=f"verbs:\n{verbs}\n\n`llava-lite VERB --help` lists the flags of a verb.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"llava-lite {__version__}")
    parser.add_argument("verb", nargs="?", metavar="VERB", help=", ".join(VERBS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="flags of the verb")
    return parser


def main(argv=None):
    """Run a verb with the rest of the command line; return its exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    verb, arguments = options.verb, options.arguments
    if verb == "help":
        verb, arguments = (arguments[0], ["--help", *arguments[1:]]) if arguments else (None, [])
        if verb is None:
            parser.print_help()
            return 0
    if verb is None:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    if verb not in VERBS:
        parser.exit(EXIT_USAGE, f"llava-lite: {unknown_verb(verb)}\n")
    if verb == "train" and asks_for_help(arguments) == "main":
        print(main_page(), end="")
        return 0
    return run(verb, arguments)


def run(verb, arguments):
    """Import and call what does a verb; an error of it is one sentence."""
    own_parser = import_module(PARSERS[verb]).build_parser() if verb in PARSERS else None
    if verb in WITH_FLAGS_OF_TRAIN:
        own_parser.parse_known_args(arguments)
    elif own_parser is not None:
        own_parser.parse_args(arguments)
    module = import_module(VERBS[verb][0])
    if verb == "train":
        # An error in the middle of a run is told with all that leads to it.
        return module.main(arguments)
    try:
        return module.main(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"llava-lite {verb}: {in_flags(sentence_of(error), own_parser)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nllava-lite {verb}: interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED


def unknown_verb(word) -> str:
    """Return the sentence for a word that is no verb."""
    if word in EVALUATION:
        return (
            f"there is no verb {word!r}. `python -m llava_lite.eval.run_llava` asks a model one question; `llava-lite "
            "train` evaluates with --eval_data_path; README.md names the benchmarks' own programs that run it."
        )
    meant = next((verb for verb, words in OTHER_VERBS.items() if word in words.split()), None)
    meant = meant or next(iter(difflib.get_close_matches(word, VERBS, n=1)), None)
    advice = f"Did you mean `llava-lite {meant}`?" if meant else f"Known: {', '.join(VERBS)}."
    return f"there is no verb {word!r}. {advice}"


if __name__ == "__main__":
    sys.exit(main())
