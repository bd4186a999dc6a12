"""What the workers of a data loader read at the moment, for the message about one that hangs or is killed."""

import os
import re
import struct
import time
from contextlib import contextmanager

import torch
from torch.utils.data import get_worker_info

from llava_lite.data.errors import DataError
from llava_lite.distributed.processes import has_ended
from llava_lite.output_file import ESCAPED

# Process, time at which it began to read (0 when it does not), bytes of the text that follows.
_HEAD = struct.Struct("qdq")
_TEXT_BYTES = 1000
# torch's message of a worker that died has no other trace of it.
_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")


class ReadingNotes:
    """A line for each worker in shared memory: its process, since when it reads, and the record and image.

    num_workers: of the loader; 0 for one that reads in its own process, which has a line too.
    """

    def __init__(self, num_workers: int):
        self.table = torch.zeros(max(1, num_workers), _HEAD.size + _TEXT_BYTES, dtype=torch.uint8).share_memory_()

    def begin(self, text: str) -> None:
        """Note what this worker begins to read."""
        row = self._get_row()
        if row is not None:
            data = text.encode("utf-8", ESCAPED)[:_TEXT_BYTES]
            row[: _HEAD.size + len(data)] = _HEAD.pack(os.getpid(), time.monotonic(), len(data)) + data

    def end(self) -> None:
        """Note that it is read; which record it was stays there."""
        row = self._get_row()
        if row is not None:
            pid, _, size = _HEAD.unpack_from(row)
            _HEAD.pack_into(row, 0, pid, 0.0, size)

    def _get_row(self):
        info = get_worker_info()
        number = 0 if info is None else info.id
        return memoryview(self.table[number].numpy()) if number < len(self.table) else None

    def read(self) -> list[tuple[int, int, float, str]]:
        """Return (worker, process, seconds since it began or 0, what it reads or read last), of those that have."""
        lines = []
        for worker, row in enumerate(self.table):
            pid, begun_s, size = _HEAD.unpack_from(row.numpy())
            text = bytes(row.numpy()[_HEAD.size : _HEAD.size + min(size, _TEXT_BYTES)]).decode(errors="replace")
            if pid:
                lines.append((worker, pid, time.monotonic() - begun_s if begun_s else 0.0, text))
        return lines

    def describe(self) -> str:
        """Return who reads what and for how long; of workers that all wait, what each has read last."""
        lines = self.read()
        busy = [line for line in lines if line[2]]
        if busy:
            return "; ".join(
                f"{_name(worker, pid)} has been reading {text} for {seconds:.0f} s"
                for worker, pid, seconds, text in sorted(busy, key=lambda line: -line[2])
            )
        found = "; ".join(f"{_name(worker, pid)} has last read {text}" for worker, pid, _, text in lines)
        return found or "no worker has begun to read"


def _name(worker: int | None, pid: int) -> str:
    if worker is None:
        return f"a worker (pid {pid})"
    return "this process" if pid == os.getpid() else f"worker {worker} (pid {pid})"


@contextmanager
def dead_workers_named(*notes: ReadingNotes | None):
    """Name the worker that died, and the record that it was reading, in an error inside that comes of its death.

    Raises DataError. torch reports it by the number of the process at best, or as a connection that was lost.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        try:
            dead = _find_dead(error, notes)
        except RuntimeError as signalled:
            # The signal of its death comes after the connection has broken.
            dead = _find_dead(signalled, notes)
        if not dead:
            raise
        found = "; ".join(
            f"{_name(worker, pid)} of the data loader was killed or crashed; it "
            + (f"{'was reading' if seconds else 'had read'} {text}" if text else "had not begun to read")
            for worker, pid, seconds, text in dead
        )
        look = ", or look at this record" if any(line[3] for line in dead) else ""
        raise DataError(
            f"{found}. Mostly the machine has run out of memory: lower --dataloader_num_workers{look}. Start the run "
            "again to resume from its last checkpoint."
        ) from error


def _find_dead(error: Exception, notes) -> list:
    """Return the lines of the workers whose death an error comes from; one that had read nothing has no text."""
    died = _DIED.search(str(error))
    pids = {int(pid) for pid in died[1].split(",")} if died else ()
    lines = [line for table in notes if table is not None for line in table.read()]
    is_cut_off = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
    # A worker that ended as it should was not reading.
    found = [line for line in lines if line[1] in pids or (is_cut_off and line[2] and has_ended(line[1]))]
    return found + [(None, pid, 0.0, "") for pid in sorted(set(pids) - {line[1] for line in found})]
