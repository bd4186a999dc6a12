"""Turn the flags of one process into the command that runs them on every device, with files that exist here."""

from __future__ import annotations

import shlex

from llava_lite.deepspeed_files import find_config


def launch_hint(argv, num_devices: int) -> str:
    """Say that one of several devices is used, and how the same flags run on all of them."""
    argv, config = list(argv), find_config("zero2.json")
    if argv[:1] and argv[0].startswith("--local_rank="):
        argv = argv[1:]
    # A YAML file stands first and may name a DeepSpeed config itself, which a flag would override.
    has_file = bool(argv) and not argv[0].startswith("-")
    has_config = has_file or any(word.partition("=")[0] == "--deepspeed" for word in argv)
    if has_config or config is not None:
        flags = argv if has_config else ["--deepspeed", config, *argv]
        command = f"deepspeed --module llava_lite.train.train {shlex.join(flags)}"
    else:
        command = f"torchrun --nproc_per_node {num_devices} -m llava_lite.train.train {shlex.join(argv)}"
    return f"this process trains on 1 of {num_devices} devices. On all of them:\n  {command}"
