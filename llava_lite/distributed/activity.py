"""Note what this process is doing, so that a watch can say it of a rank that hangs (watch.py)."""

import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

# Parts of a step give up the Python interpreter every few milliseconds: one that is silent for long has stopped.
STEP = "step"
# The process waits for its data loader.
LOADER = "loader"
# Loading and saving may keep the interpreter in one call for a minute.
LONG = "long"
# Waiting for other ranks ends in one of these, whoever calls.
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")


class Activity(NamedTuple):
    """What a process does.

    serial: of the note. place: number of notes so far that all ranks make alike, so that the rank with the smallest
    is the one behind. readers: a ReadingNotes of the loader that is waited for.
    """

    text: str = "starting"
    kind: str = LONG
    serial: int = 0
    place: int = 0
    readers: object = None


class _Process:
    """The notes of this process; one table, as a log is: whoever works need not know who watches."""

    activity = Activity()
    num_waits = 0


def note(text: str, kind: str = LONG, *, alone: bool = False, readers=None) -> None:
    """Note that this process begins to do something; it counts as progress.

    kind: STEP, LOADER or LONG. alone: other ranks may not make this note. readers: see Activity.
    """
    last = _Process.activity
    _Process.activity = Activity(text, kind, last.serial + 1, last.place + (not alone), readers)


def get_activity() -> Activity:
    """Return what this process does now."""
    return _Process.activity


@contextmanager
def waiting_for_ranks():
    """Mark the work inside as waiting for other ranks, which on a device no stack shows."""
    _Process.num_waits += 1
    try:
        yield
    finally:
        _Process.num_waits -= 1


def get_stack() -> traceback.StackSummary:
    """Return where the main thread is, without the lines of code."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    return traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False)


def is_in_collective(stack: traceback.StackSummary) -> bool:
    """Tell whether a stack, innermost frame first, ends in a call that waits for other ranks."""
    if _Process.num_waits:
        return True
    file = stack[0].filename.replace("\\", "/") if stack else ""
    is_wait = "/deepspeed/" in file and stack[0].name in ("wait", "synchronize", "barrier")
    return is_wait or any(part in file for part in _COLLECTIVES)


def describe_place(stack: traceback.StackSummary) -> str:
    """Return the file, line, function and code of the innermost frame."""
    if not stack:
        return "no Python code"
    frame = stack[0]
    return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line or '?'}"


class NotedBatches:
    """The batches of a loader; waiting for one is noted, and so is its arrival.

    what: whose batches, for the note. The other arguments are those of `note`.
    """

    def __init__(self, batches, what: str, *, alone: bool = False, readers=None, then: str = LONG):
        self.batches, self.what, self.then = iter(batches), what, then
        self.alone, self.readers = alone, readers

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        note(f"{self.what}: waiting for a batch of the loader", LOADER, alone=self.alone, readers=self.readers)
        try:
            return next(self.batches)
        finally:
            note(f"{self.what}: has a batch", self.then, alone=self.alone)
