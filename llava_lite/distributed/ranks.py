"""Let the ranks of a run agree on values and errors, and end together."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import torch.distributed as dist

from llava_lite.distributed.activity import waiting_for_ranks


def everyone(value) -> list:
    """Return the value of every rank, in rank order; all ranks must call it, so it is a barrier too."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
    with waiting_for_ranks():
        dist.all_gather_object(values, value)
    return values


def raise_together(error: Exception | None, kind: type[Exception], advice: str) -> None:
    """Raise `kind` on every rank if one of them has an error; the others would wait for that one forever."""
    reports = everyone(None if error is None else (type(error).__name__, str(error)))
    failed = [f"rank {rank}: {': '.join(report)}" for rank, report in enumerate(reports) if report is not None]
    if not failed:
        return
    # A single process has no ranks to name, and its traceback names the kind of error.
    found = reports[0][1] if len(reports) == 1 else "; ".join(failed)
    failure = kind(f"{found.rstrip('.')}. {advice}")
    # Every rank raises the same message; see train/startup.py.
    failure.reported_by_first_of = "RANK"
    raise failure from error


def leave() -> None:
    """Leave the other ranks, when none of them needs this one any more; all ranks must call it."""
    if dist.is_available() and dist.is_initialized():
        # A barrier: a rank that leaves while another waits for it would end that one with an error.
        everyone(None)
        # Threads of a group that still runs when Python ends can abort the process.
        dist.destroy_process_group()


def let_threads_finish(limit_s: float = 5.0) -> None:
    """Wait until no other thread of this process runs, for at most `limit_s` seconds; for `atexit`.

    A thread of gloo frees its tensors after the collective has returned, and needs Python for it. On a busy machine it
    may come to that only when Python has ended, and then aborts the process ("terminate called without an active
    exception", status -6). Libraries keep their process groups, so `destroy_process_group` does not end these threads.
    """
    deadline, quiet = time.monotonic() + limit_s, 0
    # Twice in a row: a thread that waits for Python looks idle, and gets it in the next sleep.
    while quiet < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
        quiet = 0 if _other_threads_run() else quiet + 1


def _other_threads_run() -> bool:
    """Whether a thread other than the main one has work to do; False on a system that does not tell."""
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        return False
    others = [task for task in tasks.iterdir() if task.name != str(os.getpid())]
    try:
        # "12 (name) S ...": the letter after the name is the state, R for running or ready to run.
        states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in others]
    except OSError:  # one has just ended
        return True
    return "R" in states


def stand_alone():
    """Set what a launcher would set for a single process: without it, DeepSpeed asks MPI for its rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
