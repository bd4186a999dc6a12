"""Note what this process is doing, so that a watch can say it of a rank that hangs (watch.py)."""

import re
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import dropwhile
from typing import NamedTuple

# Parts of a step give up the Python interpreter every few milliseconds: one that is silent for long has stopped.
STEP = "step"
# The process waits for its data loader.
LOADER = "loader"
# Loading and saving may keep the interpreter in one call for a minute.
LONG = "long"
# Waiting for other ranks ends in one of these, whoever calls. DDP and autograd wait in C++: for the gradients of all
# ranks, and on a device for its work, which may be a collective.
_AUTOGRAD = "torch/autograd/"
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "torch/nn/parallel/distributed.py", _AUTOGRAD)
# So do functions of these names there, and lines that call one, which is C where no further frame shows it: the
# handles of ZeRO-3's gathers, events and streams of a device.
_WAITS, _WAITERS = ("wait", "synchronize", "barrier"), ("/deepspeed/", "/torch/")
_CALLS_WAIT = re.compile(r"\.(wait|synchronize|barrier)\b")
# Needs a number of the device, whoever calls; of a tensor on the CPU no such call takes seconds.
_NEEDS_DEVICE = re.compile(r"\.(item|tolist|cpu)\(\)")
# Calls any function and is its last Python code where that one is C, as the wait of a handle is.
_WRAPPERS = ("deepspeed/utils/nvtx.py", "torch/_ops.py")


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


def get_stack() -> list[traceback.FrameSummary]:
    """Return where the work of the main thread is, innermost frame first, without the lines of code."""
    frames = sys._current_frames()
    stack = _summarize(frames.get(threading.main_thread().ident))
    if stack and _AUTOGRAD in get_file(stack[0]):
        # The backward pass of a device calls hooks from threads that Python has not started, and has given a name of
        # this kind at most.
        started = {thread.ident for thread in threading.enumerate() if not thread.name.startswith("Dummy-")}
        hooks = [_summarize(frame) for ident, frame in frames.items() if ident not in started]
        return hooks[0] if hooks else stack
    return stack


def _summarize(frame) -> list[traceback.FrameSummary]:
    """Return the stack of a frame, without wrappers that call something outside of Python."""
    return without_wrappers(traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False))


def without_wrappers(stack: Sequence[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Return a stack, innermost frame first, from the first frame that is not a wrapper's."""
    return list(dropwhile(lambda frame: any(part in get_file(frame) for part in _WRAPPERS), stack))


def get_file(frame: traceback.FrameSummary) -> str:
    """Return the file of a frame, with slashes."""
    return frame.filename.replace("\\", "/")


def is_in_collective(stack: Sequence[traceback.FrameSummary]) -> bool:
    """Tell whether a stack, innermost frame first, ends in a call that waits for other ranks.

    On a device a kernel waits, and the main thread in whatever needs its result: where that is none of the calls known
    here, only the places that the ranks have reached tell who is behind.
    """
    if _Process.num_waits:
        return True
    if not (stack := without_wrappers(stack)):
        return False
    file = get_file(stack[0])
    if any(part in file for part in _COLLECTIVES) or _NEEDS_DEVICE.search(stack[0].line or ""):
        return True
    is_wait = stack[0].name in _WAITS or _CALLS_WAIT.search(stack[0].line or "") is not None
    return is_wait and any(part in file for part in _WAITERS)


def describe_place(stack: Sequence[traceback.FrameSummary]) -> str:
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

    def close(self) -> None:
        """End the iterator, if it is a generator."""
        if hasattr(self.batches, "close"):
            self.batches.close()
