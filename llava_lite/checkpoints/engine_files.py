"""Turn the files of a DeepSpeed engine in checkpoint-N into weights by name, without running code in them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from enum import Enum
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError

import torch

from llava_lite.checkpoints.copying import readable
from llava_lite.checkpoints.manifest import is_inside
from llava_lite.hub.pickles import load_pickle

logger = logging.getLogger(__name__)

# The file by which an engine finds the directory of its own files.
LATEST = "latest"
# Of a file's name, on every file system.
LONGEST_TAG = 255
# What the engine's pickles hold besides tensors and plain values: states without code of their own.
OF_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}


def engine_directory(path) -> Path | None:
    """Return the directory of an engine's files in a local checkpoint-N, None where there is none.

    Raises OSError where the checkpoint names a directory that it does not hold, or one outside.
    """
    latest = Path(path) / LATEST
    if not latest.is_file():
        return None
    with latest.open(encoding="utf-8", errors="replace") as stream:
        text = stream.read(LONGEST_TAG + 1)
    tag = text.strip()
    directory, is_short = Path(path) / tag, len(text) <= LONGEST_TAG
    # Itself in the checkpoint: neither its parent, by "..", nor a link to elsewhere.
    is_inner = is_short and is_inside(tag) and directory.resolve().parent == Path(path).resolve()
    if not is_inner or not directory.is_dir():
        raise OSError(
            f"{str(path)!r} is no complete checkpoint: its file {LATEST!r} names {tag[:LONGEST_TAG]!r}, and there is "
            "no such directory beside it. Copy the checkpoint again."
        )
    return directory


def engine_weights(path) -> Mapping:
    """Return the trained weights of a checkpoint-N in float32, put together from all ranks, by the run's own names.

    By DeepSpeed's converter, under ZeRO-2 and ZeRO-3. The values are tensors or, under ZeRO-3, what becomes one by
    `.contiguous()`: no more than one need be in memory.
    """
    converter, directory = deepspeed_module("deepspeed.utils.zero_to_fp32", path), engine_directory(path)
    check_no_code(directory)
    # It reports on standard output, where a program's own results go.
    try:
        with redirect_stdout(sys.stderr):
            return converter.get_fp32_state_dict_from_zero_checkpoint(
                str(path), tag=directory.name, exclude_frozen_parameters=True, lazy_mode=True
            )
    except (ValueError, KeyError, FileNotFoundError, NotImplementedError) as error:
        raise OSError(
            f"the weights of {str(path)!r} cannot be put together from the files of its ranks "
            f"({type(error).__name__}: {error}). Copy the complete checkpoint again, or open another."
        ) from error


def deepspeed_module(name: str, path):
    """Return a module of DeepSpeed; ImportError names the checkpoint that needs it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{str(path)!r} holds its weights in DeepSpeed's files; pip install 'llava-lite[train]' to open it."
        ) from error


def check_no_code(directory: Path) -> None:
    """Raise ValueError for an engine's file that holds more than tensors, plain values and DeepSpeed's own states.

    DeepSpeed unpickles without looking, and a pickle can run anything. The values of tensors are not read here.
    """
    for file in sorted(directory.rglob("*.pt")):
        read_state(file)


def read_state(file: Path, mmap: bool = True):
    """Return what a file of an engine holds, its tensors mapped; raises ValueError where that is code."""
    with readable(file, "the state of a DeepSpeed engine"), torch.serialization.safe_globals(allowed_states(file)):
        return load_pickle(file, mmap=mmap)


def allowed_states(file="the checkpoint") -> list:
    """Return the classes of OF_DEEPSPEED, and what reads members of enumerations; ImportError names the file."""
    kinds = [getattr(deepspeed_module(name, file), kind) for name, kinds in OF_DEEPSPEED.items() for kind in kinds]
    return [*kinds, (get_member, "builtins.getattr")]


def get_member(kind, name: str) -> Enum:
    """Return the member of an enumeration, which Python 3.11.0 to 3.11.3 pickle as getattr(kind, name)."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise UnpicklingError(f"GLOBAL builtins.getattr was to read {name!r} of {kind!r}, no member of an enumeration")
    return kind[name]
