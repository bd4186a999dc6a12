"""Turn an error of the preparation into one line on the terminal instead of a traceback on every rank."""

import os
import sys
from contextlib import contextmanager

from llava_lite.commands.parser import sentence_of

TRACEBACK = "LLAVA_LITE_TRACEBACK"
FOR_PEOPLE = (ValueError, OSError, ImportError)
# An attribute of an error: the variable that counts the ranks among which only the first tells it.
TOLD_BY_FIRST_OF = "told_by_first_of"


@contextmanager
def same_for_the_node():
    """Mark an error raised inside as one that every rank of a node meets alike, so that its first rank tells it."""
    try:
        yield
    except FOR_PEOPLE as error:
        setattr(error, TOLD_BY_FIRST_OF, "LOCAL_RANK")
        raise


@contextmanager
def told_in_a_line(kinds: tuple[type[Exception], ...] = FOR_PEOPLE):
    """End the process with status 1 and one line for an error raised inside: a ValueError, OSError or ImportError.

    These are for the person who wrote the flags. LLAVA_LITE_TRACEBACK=1 shows where they come from; anything else, and
    whatever happens once the run trains, is shown whole. kinds: others, as those of records that cannot be read.
    """
    try:
        yield
    except kinds as error:
        if os.environ.get(TRACEBACK, "0") not in ("", "0"):
            raise
        rank = os.environ.get("RANK", "0")
        if os.environ.get(getattr(error, TOLD_BY_FIRST_OF, ""), "0") == "0":
            # One write: the lines of several ranks do not mix.
            sys.stderr.write(f"llava-lite train{'' if rank == '0' else f' (rank {rank})'}: {sentence_of(error)}\n")
        sys.exit(1)
