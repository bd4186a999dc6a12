"""Turn a checkpoint-N of a run into its weights at that step, by the names of a finished directory."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from llava_lite.checkpoints.copying import read_weights
from llava_lite.checkpoints.engine_files import LATEST, engine_directory, engine_weights
from llava_lite.checkpoints.manifest import (
    MANIFEST,
    BrokenCheckpoint,
    checkpoints_in,
    has_lost_manifest,
    read_manifest,
    verify,
)
from llava_lite.checkpoints.source import Checkpoint
from llava_lite.formats.llava import plain_name

logger = logging.getLogger(__name__)

STATE, TRAINED = "trainer_state.json", "trained.safetensors"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What only a run reads: a checkpoint without them, to save space, is still a model.
FOR_A_RUN = re.compile(r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|progress_\d+\.pt")
_TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken")
# PEFT names an adapter's weights after the adapter while it trains, and no more when it is saved.
_LORA = re.compile(r"(\.lora_\w+)\.default(?=\.|$)")


def holds_step(path) -> bool:
    """Tell whether a local directory holds the state of a run at a step, with its trained weights or without.

    A finished directory has no manifest. Raises BrokenCheckpoint for the state of a run that has lost its own.
    """
    directory = Path(path)
    if has_lost_manifest(directory):
        raise BrokenCheckpoint(directory, MANIFEST, "is missing")
    # Any of them: one may be the file that is lost, and a manifest.json alone may be another program's.
    is_ours = any((directory / name).is_file() for name in (TRAINED, STATE)) or engine_directory(directory) is not None
    return is_ours and (directory / MANIFEST).is_file()


def verify_texts(path) -> None:
    """Compare config, tokenizer and settings of a checkpoint-N with the manifest, before any of them is read.

    Does nothing for any other path. Raises BrokenCheckpoint.
    """
    if path is not None and os.path.isdir(path) and holds_step(path):
        verify(path, lambda name: name.endswith(_TEXTS))


def verify_model(path) -> None:
    """Compare the files of a checkpoint-N that a model is opened from with the manifest; raises BrokenCheckpoint."""
    verify(path, lambda name: FOR_A_RUN.fullmatch(name) is None)


def name_newest(path) -> str:
    """Return the end of a message about a directory that is no model: its newest checkpoint, and which are broken."""
    hint = ""
    for step in checkpoints_in(path):
        try:
            # Those of other programs have no manifest.
            if (step / MANIFEST).exists() or has_lost_manifest(step):
                # Sizes alone, for a message; whoever opens the checkpoint compares the rest.
                verify(step, lambda name: FOR_A_RUN.fullmatch(name) is None, hashes=False)
        except BrokenCheckpoint as error:
            hint += f"; its {step.name} is not complete ({error.file} {error.reason})"
            continue
        if (step / "config.json").is_file():
            return f"{hint}; a checkpoint of it is {str(step)!r}"
    return hint


def step_weights(path) -> tuple[Mapping, dict]:
    """Return the trained weights of a checkpoint-N by plain names, and its LoRA by PEFT's, which may be empty.

    The files must have been compared with the manifest, see `verify_model`. Values as in `engine_weights`. Raises
    OSError for a checkpoint without config.json, ValueError for files with code.
    """
    directory = Path(path)
    # Under expert parallelism the experts of all ranks are in one file, whatever the engine's files hold.
    in_engine = not (directory / TRAINED).is_file()
    held = engine_weights(directory) if in_engine else read_weights(directory / TRAINED, is_verified=True)
    logger.info("opening %s: %s", directory, describe_step(directory))
    others = {plain_name(name): weight for name, weight in held.items() if ".lora_" not in name}
    return others, {_LORA.sub(r"\1", name): weight for name, weight in held.items() if ".lora_" in name}


def describe_step(path) -> str:
    """Return the step of the run at which a checkpoint was saved, and its ranks."""
    state, manifest = Checkpoint(path).read_json(STATE), read_manifest(path)
    ranks, stage = manifest["world_size"], manifest["steps"].get("DeepSpeed ZeRO stage")
    of_ranks = f", saved by {ranks} rank{'s' * (ranks != 1)}" + ("" if stage is None else f" under ZeRO-{stage}")
    return f"step {state.get('global_step')} of {state.get('max_steps')}{of_ranks}"


def check_has_config(path) -> None:
    """Raise OSError for the state of a run without the config.json of its model."""
    directory = Path(path)
    if directory.is_dir() and not (directory / "config.json").is_file() and holds_step(directory):
        raise OSError(
            f"{str(path)!r} holds the state of a run and no config.json, as checkpoints of early versions: resume the "
            "run from it (--resume_from_checkpoint) with --max_steps at its step, and its --output_dir becomes the "
            "model."
        )


@contextmanager
def get_step_adapter(path, adapter: Mapping | None = None) -> Iterator[Path]:
    """Give a directory with the LoRA of a checkpoint-N as a finished run writes it, in the run's dtype.

    adapter: its weights if they are read already.
    """
    adapter = step_weights(path)[1] if adapter is None else adapter
    with linked_directory(path, lambda name: name == ADAPTER) as directory:
        write_weights(adapter, directory / ADAPTER_WEIGHTS, path)
        yield directory


@contextmanager
def step_without_adapter(path) -> Iterator[Path]:
    """Give a directory with the other trained weights of a checkpoint-N, as a finished run writes it."""
    gone = (ADAPTER, MANIFEST, LATEST, TRAINED)
    with linked_directory(path, lambda name: name not in gone and not FOR_A_RUN.fullmatch(name)) as directory:
        write_weights(step_weights(path)[0], directory / TRAINED, path)
        yield directory


@contextmanager
def linked_directory(path, keeps: Callable[[str], bool]) -> Iterator[Path]:
    """Give a temporary directory with links to those files of a directory whose names `keeps` accepts."""
    with tempfile.TemporaryDirectory() as there:
        for file in Path(path).iterdir():
            if file.is_file() and keeps(file.name):
                (Path(there) / file.name).symlink_to(file.resolve())
        yield Path(there)


def write_weights(weights: Mapping, file: Path, path) -> None:
    """Write weights of a checkpoint-N to a file, in the run's dtype."""
    dtype = getattr(torch, Checkpoint(path).fields.get("dtype") or "float32")
    # Copies: tied weights share memory, which a safetensors file does not allow.
    copies = {name: weight.contiguous().to(dtype, copy=True) for name, weight in weights.items()}
    save_file(copies, file, metadata={"format": "pt"})
