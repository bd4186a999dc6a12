"""Let an error of one rank end all of them, with the same message."""

from contextlib import contextmanager

from llava_lite.distributed.ranks import raise_together


@contextmanager
def together(kind: type[Exception], advice: str, caught=Exception):
    """Raise `kind` on every rank if an error is raised inside on one of them; no collective may stand inside.

    caught: the errors that are reported so; another one is raised as it is, on its rank alone.
    """
    error = None
    try:
        yield
    except caught as problem:
        error = problem
    raise_together(error, kind, advice)
