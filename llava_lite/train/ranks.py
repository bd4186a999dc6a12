"""Let the ranks of a run agree: on a value, on an error, on what each of them does."""

from __future__ import annotations

import atexit
import os
import sys

import torch.distributed as dist


def everyone(value) -> list:
    """Return the value of every rank, in rank order; all ranks must call it, so it is a barrier too."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_together(error: Exception | None, kind: type[Exception], advice: str) -> None:
    """Raise `kind` on every rank if one of them has an error; without it the others would wait for it for ever."""
    reports = everyone(None if error is None else (type(error).__name__, str(error)))
    failed = [f"rank {rank}: {': '.join(report)}" for rank, report in enumerate(reports) if report is not None]
    if not failed:
        return
    # A single process has no ranks to tell apart, and what is raised there says its kind.
    found = reports[0][1] if len(reports) == 1 else "; ".join(failed)
    failure = kind(f"{found.rstrip('.')}. {advice}")
    # See refusal.py: every rank raises the same sentence.
    failure.told_by_first_of = "RANK"
    raise failure from error


def leave() -> None:
    """End this process of several at once, when all is written and what was registered for its end is done.

    Python ends the threads that libraries still run wherever they stand, and one that stands in C++ then aborts the
    process ("terminate called without an active exception"): seen on busy machines, behind a run that had saved all.
    """
    # Private, and there since Python 2: the only way to have them called without the end that follows.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)
