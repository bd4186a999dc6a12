"""Check before a run whether DeepSpeed can offload to the disk."""

import os
from pathlib import Path

PARTS = ("offload_optimizer", "offload_param")


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
