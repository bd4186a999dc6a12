"""Turn the name of a DeepSpeed JSON of the repository into a path that exists where the user stands."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = ("zero2.json", "zero3.json")


def find_config(name: str) -> str | None:
    """Return the path of a file of the repository as it can be typed here, None where it is not at hand."""
    if os.path.isfile(name):
        return name
    path = REPOSITORY / name
    if not path.is_file():
        return None
    beside = os.path.relpath(path)
    return str(path) if beside.startswith("..") else beside


def deepspeed_advice() -> str:
    """Return the sentence that says what --deepspeed takes."""
    found = [path for name in CONFIGS if (path := find_config(name)) is not None]
    if found:
        return f"Give a DeepSpeed JSON such as {' or '.join(found)}."
    return 'Give a DeepSpeed JSON, or its text: \'{"zero_optimization": {"stage": 2}}\'.'
