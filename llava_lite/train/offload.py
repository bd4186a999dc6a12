"""See beforehand whether what DeepSpeed is to put on disk can go there, and whether it can build what it needs."""

import logging
import os
import time
from pathlib import Path

logger = logging.getLogger(__name__)

PARTS = ("offload_optimizer", "offload_param")
# A build takes about two minutes.
OLD_LOCK_S = 600


def refuse_unusable_nvme(config: dict) -> None:
    """Raise ValueError if a DeepSpeed config offloads to NVMe and its folder or libaio is not there.

    DeepSpeed would say so, in a traceback, when the model has been loaded.
    """
    zero = config.get("zero_optimization") or {}
    on_disk = {part: zero[part] for part in PARTS if (zero.get(part) or {}).get("device") == "nvme"}
    for part, settings in on_disk.items():
        folder = settings.get("nvme_path")
        if not folder or not Path(folder).is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(
                f"--deepspeed: {part} goes to nvme_path {folder}, which is no folder that can be written; make it, or "
                'a link of that name, on every node, or offload to "cpu".'
            )
    if on_disk and not _has_asynchronous_io():
        raise ValueError(
            f"--deepspeed: {' and '.join(on_disk)} to nvme needs DeepSpeed's asynchronous I/O, which does not build "
            'here: install libaio (Debian: libaio-dev; not for ranks on a CPU), or offload to "cpu".'
        )


def _has_asynchronous_io() -> bool:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    # The CPU's builder calls itself compatible and fails when it loads.
    if accelerator.device_name() == "cpu":
        return False
    builder = accelerator.create_op_builder("AsyncIOBuilder")
    return builder is not None and builder.is_compatible(verbose=False)


def warn_of_old_locks() -> None:
    """Say which locks a build that was killed may have left: DeepSpeed waits for one in silence and for ever."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        try:
            minutes = (time.time() - lock.stat().st_mtime) / 60
        except FileNotFoundError:
            # A build that has just ended.
            continue
        if minutes * 60 > OLD_LOCK_S:
            logger.warning(
                "%s is %.0f minutes old: a build that was killed leaves its lock, and every later run waits for it. "
                "If nothing builds there now, remove the file.",
                lock,
                minutes,
            )
