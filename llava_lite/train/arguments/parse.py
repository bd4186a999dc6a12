"""Turn a command line, or a YAML file with flags after it, into the arguments of a run."""

import logging

from llava_lite.train.arguments.fields import DataArguments, ModelArguments, TrainingArguments
from llava_lite.train.arguments.help import FlagParser
from llava_lite.train.arguments.legacy import open_yaml, split_flags, translate
from llava_lite.train.arguments.packing import resolve_packing
from llava_lite.train.arguments.tuning import resolve_tuning
from llava_lite.train.arguments.validate import check_together
from llava_lite.train.arguments.without_effect import without_effect
from llava_lite.train.arguments.words import bare, unknown_flags, words_left

logger = logging.getLogger(__name__)


def build_parser():
    """Return the parser of every flag; none may be abbreviated."""
    return FlagParser(
        (ModelArguments, DataArguments, TrainingArguments),
        prog="llava-lite train",
        allow_abbrev=False,
        usage="llava-lite train [run.yaml] [--flag value ...]",
    )


def parse_args(argv, command="train", more_flags=()):
    """Return (model_args, data_args, training_args) from flags, or from a YAML file and flags that override it.

    Flags of LLaVA, MoE-LLaVA and transformers 4 are translated. command: for the messages; more_flags: those that the
    command has read itself. Raises ValueError for an unknown flag and for flags that contradict each other.
    """
    argv = open_yaml(argv)
    parser = build_parser()
    known = {action.dest for action in parser._actions}
    words = translate(argv, known)
    known |= {bare(flag) for action in parser._actions for flag in action.option_strings}
    names = [name for name, _ in split_flags(words) if name]
    if unknown := [f"--{name}" for name in names if name not in known]:
        raise ValueError(unknown_flags(command, unknown, [*(f"--{name}" for name in known), *more_flags]))
    model_args, data_args, training_args, left = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if left:
        raise ValueError(words_left(command, left))
    model_args.given = frozenset(map(bare, names))
    resolve_tuning(model_args, training_args)
    resolve_packing(model_args, training_args)
    check_together(model_args, data_args, training_args)
    for flag, reason in without_effect(model_args, training_args):
        logger.info("%s has no effect: %s.", flag, reason)
    return model_args, data_args, training_args
