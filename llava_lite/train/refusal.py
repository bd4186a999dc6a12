"""Turn an error of the preparation into one line on the terminal instead of a traceback on every rank."""

import os
import sys
from contextlib import contextmanager

TRACEBACK = "LLAVA_LITE_TRACEBACK"


@contextmanager
def told_in_a_line():
    """End the process with status 1 and one line for a ValueError, OSError or ImportError raised inside.

    These are for the person who wrote the flags. LLAVA_LITE_TRACEBACK=1 shows where they come from; anything else, and
    whatever happens once the run trains, is shown whole.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get(TRACEBACK, "0") not in ("", "0"):
            raise
        rank = os.environ.get("RANK", "0")
        # One write: the lines of several ranks do not mix.
        sys.stderr.write(f"llava-lite train{'' if rank == '0' else f' (rank {rank})'}: {said(error)}\n")
        sys.exit(1)


def said(error) -> str:
    """Return the words of an error; one that names a file only by its number is told with the file."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{str(error.filename)!r}: {error.strerror}."
    return str(error) or type(error).__name__
