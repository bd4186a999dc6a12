"""Hold the directory of a run's answers, so that one process writes each file and runs do not mix.

The chunks of one run work in it side by side. A lock is the operating system's: that of a process that died is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_lite.eval.answers import claim, compare, forget, part_name
from llava_lite.eval.ranks import Ranks

JOINS = ".join.lock"
# Held for a moment, by a process that looks who else is there.
LOOKS = ".look.lock"


@contextmanager
def begin(
    directory: Path, run: Mapping[str, Any], ranks: Ranks, overwrite: bool, check: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold what this process writes of a run's directory, which is that of this run from then on.

    check: called by every rank before anything changes. overwrite: delete earlier answers. Raises ValueError for the
    answers of another run, and what `hold` raises.
    """
    if not ranks.asks:
        compare(directory, run)

    def start(is_alone: bool) -> None:
        check()
        if overwrite:
            forget(directory)
        (claim if ranks.asks and is_alone else compare)(directory, run)

    first = (lambda is_alone: None) if ranks.is_launched else start
    with hold(directory, ranks.count, ranks.index if ranks.asks else None, first):
        if ranks.is_launched:
            check()
            # Every rank has looked, and holds its part, before one deletes.
            ranks.wait()
            if ranks.is_first:
                start(True)
            ranks.wait()
        yield


@contextmanager
def hold(
    directory: Path, num_chunks: int, index: int | None, start: Callable[[bool], None] = lambda is_alone: None
) -> Iterator[None]:
    """Hold one chunk of a run's directory, or all of it with the index None, for a process that joins the chunks.

    start: called where nobody comes in between, with whether no other chunk is held. Raises BlockingIOError, having
    changed nothing, if another process holds the same chunk or one of another number of chunks, or joins them.
    """
    from filelock import FileLock, Timeout

    directory.mkdir(parents=True, exist_ok=True)
    own = JOINS if index is None else lock_name(num_chunks, index)
    beside = set() if index is None else {lock_name(num_chunks, i) for i in range(num_chunks)}
    mine, is_alone = FileLock(directory / own), True
    try:
        with FileLock(directory / LOOKS):
            for name in dict.fromkeys([own, *sorted(path.name for path in directory.glob(".*.lock"))]):
                lock = mine if name == own else FileLock(directory / name)
                try:
                    if name != LOOKS:
                        lock.acquire(timeout=0)
                except Timeout:
                    if name == own or name not in beside:
                        raise BlockingIOError(
                            f"another process {what(name)} in {directory} at this moment. Wait until it has ended, "
                            "or write elsewhere."
                        ) from None
                    is_alone = False
                if lock is not mine:
                    lock.release()
            start(is_alone)
        yield
    finally:
        mine.release()


def remove_locks(directory: Path) -> None:
    """Delete the files of the locks of a directory that nobody needs any more."""
    for path in directory.glob(".*.lock"):
        path.unlink(missing_ok=True)


def lock_name(num_chunks: int, index: int) -> str:
    """Return the name of a chunk's lock."""
    return f".{Path(part_name(num_chunks, index)).stem}.lock"


def what(name: str) -> str:
    """Return what the holder of a lock does."""
    if name == JOINS:
        return "joins the chunks"
    _, index, _, num_chunks = name.removesuffix(".lock").split("_")
    return "answers the questions" if num_chunks == "1" else f"answers chunk {index} of {num_chunks}"
