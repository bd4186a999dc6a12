"""Locks of DeepSpeed's extensions: a build that was killed leaves its own, and later runs wait for it for ever."""

import logging
import os
import time
from pathlib import Path

from llava_lite.distributed.processes import is_open

logger = logging.getLogger(__name__)

# A build takes about two minutes. A lock that is so old, and that nobody has open, is of one that was killed.
MOST_S = 600
# Between the closing of a lock and its removal.
_CLOSING_S = 0.5


def wait_for_builds(most_s: float = MOST_S, interval_s: float = 1.0) -> None:
    """Return when no lock keeps DeepSpeed waiting, except one of a build that runs on this machine.

    A build has its lock open. One that no process here has open may be that of another machine or container until it
    is `most_s` seconds old; then it raises OSError with the file to remove.
    """
    said = set()
    while unowned := _find_unowned():
        for lock, age_s in unowned.items():
            found = f"{lock} is {age_s / 60:.0f} min old, and no process here has it open"
            if age_s >= most_s:
                raise OSError(
                    f"{found}: the build that made it was killed, and DeepSpeed would wait for it for ever. Remove "
                    "the file and start again."
                )
            if lock not in said:
                logger.warning(
                    "%s: a build that was killed has left it, or another machine builds there. Waiting until it is "
                    "%.0f min old; remove the file if nothing builds.",
                    found,
                    most_s / 60,
                )
                said.add(lock)
        time.sleep(interval_s)


def _find_unowned() -> dict[Path, float]:
    """Return the locks that no process here has open, with their age in seconds."""
    found = {lock: age_s for lock, age_s in _find_locks().items() if not is_open(lock.resolve())}
    if not found:
        return {}
    time.sleep(_CLOSING_S)
    return {lock: age_s for lock, age_s in _find_locks().items() if lock in found}


def _find_locks() -> dict[Path, float]:
    """Return the locks of DeepSpeed's extensions where torch builds them, with their age in seconds."""
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = {}
    for lock in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        if lock.parent.name in ALL_OPS:
            try:
                locks[lock] = time.time() - lock.stat().st_mtime
            except FileNotFoundError:  # its build has just ended
                continue
    return locks
