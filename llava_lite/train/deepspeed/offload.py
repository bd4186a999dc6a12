"""Check before a run whether DeepSpeed can offload to the disk, and whether it can build its extensions."""

import logging
import os
import time
from pathlib import Path

from llava_lite.distributed.processes import is_open

logger = logging.getLogger(__name__)

PARTS = ("offload_optimizer", "offload_param")
# A build takes about two minutes.
OLD_LOCK_S = 600


def check_nvme(config: dict) -> None:
    """Raise ValueError if a DeepSpeed config offloads to NVMe without a directory or without libaio.

    DeepSpeed would raise only after the model has been loaded.
    """
    zero = config.get("zero_optimization") or {}
    on_disk = {part: zero[part] for part in PARTS if (zero.get(part) or {}).get("device") == "nvme"}
    for part, settings in on_disk.items():
        directory = settings.get("nvme_path")
        if not directory or not Path(directory).is_dir() or not os.access(directory, os.W_OK | os.X_OK):
            raise ValueError(
                f"--deepspeed: {part} goes to nvme_path {directory}, which is no directory that can be written; "
                'create it, or a link of that name, on every node, or offload to "cpu".'
            )
    if on_disk and not _has_asynchronous_io():
        raise ValueError(
            f"--deepspeed: {' and '.join(on_disk)} to nvme needs DeepSpeed's asynchronous I/O, which does not build "
            'here: install libaio (Debian: libaio-dev; not for ranks on a CPU), or offload to "cpu".'
        )


def _has_asynchronous_io() -> bool:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    # The CPU's builder reports that it is compatible, and fails when it loads.
    if accelerator.device_name() == "cpu":
        return False
    builder = accelerator.create_op_builder("AsyncIOBuilder")
    return builder is not None and builder.is_compatible(verbose=False)


def warn_about_old_locks() -> None:
    """Warn of locks that a killed build may have left: DeepSpeed waits for one silently and forever.

    A build has its lock open. One that nobody here has open may still be that of another machine or container.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        try:
            minutes = (time.time() - lock.stat().st_mtime) / 60
        except FileNotFoundError:
            # Its build has just ended.
            continue
        is_open_here = is_open(lock.resolve())
        if minutes * 60 > OLD_LOCK_S or not is_open_here:
            logger.warning(
                "%s is %.0f minutes old%s: a build that was killed leaves its lock, and every later run waits for it. "
                "If nothing builds there now, remove the file.",
                lock,
                minutes,
                "" if is_open_here else ", and no process here has it open",
            )
