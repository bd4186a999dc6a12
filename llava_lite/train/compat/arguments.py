"""Complete the training arguments that a script for LLaVA declares itself with those that only ours have."""

import dataclasses

from llava_lite.train.arguments.fields import TrainingArguments

# Properties of ours that others may lack.
WORKED_OUT = ("uses_deepspeed", "zero_stage")


def completed(args):
    """Return the arguments with our defaults for fields that they lack; those of our own class are complete.

    args: of transformers, or of a class that a script derives from it, as LLaVA's train.py does.
    """
    if isinstance(args, TrainingArguments):
        return args
    for field in dataclasses.fields(TrainingArguments):
        if field.init and not hasattr(args, field.name):
            setattr(args, field.name, field.default)
    for name in WORKED_OUT:
        if not hasattr(args, name):
            setattr(args, name, getattr(TrainingArguments, name).fget(args))
    return args
