"""Let the ranks of a run agree: on a value, on an error, on what each of them does."""

from __future__ import annotations

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
    reports = everyone(None if error is None else f"{type(error).__name__}: {error}")
    failed = [f"rank {rank}: {report}" for rank, report in enumerate(reports) if report is not None]
    if failed:
        raise kind(f"{'; '.join(failed)}. {advice}") from error
