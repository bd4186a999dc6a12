"""Let the ranks of a run agree on values and errors, and end together."""

from __future__ import annotations

import os
import socket

import torch.distributed as dist


def everyone(value) -> list:
    """Return the value of every rank, in rank order; all ranks must call it, so it is a barrier too."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
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


def stand_alone():
    """Set what a launcher would set for a single process: without it, DeepSpeed asks MPI for its rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
