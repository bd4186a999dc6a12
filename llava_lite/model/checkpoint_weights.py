"""Turn checkpoint-N of a run into the weights that it held at that step, by the names of a finished directory."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from llava_lite.companions import read_json
from llava_lite.formats.llava import plain_name
from llava_lite.model.engine_files import LATEST, engine_folder, engine_weights
from llava_lite.model.weights import read_weights

logger = logging.getLogger(__name__)

# The last file of a checkpoint-N; a finished directory has none.
MANIFEST = "manifest.json"
STATE, TRAINED = "trainer_state.json", "trained.safetensors"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# PEFT names an adapter's weights after the adapter while it trains, and no more when it is saved.
_LORA = re.compile(r"(\.lora_\w+)\.default(?=\.|$)")


def holds_step(path) -> bool:
    """Tell whether a local directory holds the state of a run at a step, and what it had trained by then."""
    folder = Path(path)
    return (folder / MANIFEST).is_file() and ((folder / TRAINED).is_file() or engine_folder(folder) is not None)


def step_weights(path) -> tuple[Mapping, dict]:
    """Return what a checkpoint-N had trained, by plain names, and its LoRA by PEFT's, which may be empty.

    Values as in `engine_weights`. Raises OSError for a checkpoint without config.json, ValueError for files with code.
    """
    folder = Path(path)
    # Experts that ranks share out are in one file, whatever the engine has in its own.
    in_engine = not (folder / TRAINED).is_file()
    held = engine_weights(folder) if in_engine else read_weights(folder / TRAINED)
    logger.info("opening %s: %s", folder, step_in_words(folder))
    others = {plain_name(name): weight for name, weight in held.items() if ".lora_" not in name}
    return others, {_LORA.sub(r"\1", name): weight for name, weight in held.items() if ".lora_" in name}


def step_in_words(path) -> str:
    """Return which step of which run a checkpoint holds."""
    state, manifest = (read_json(path, name, {}) for name in (STATE, MANIFEST))
    ranks = manifest.get("world_size")
    of_ranks = "" if ranks is None else f", saved by {ranks} rank{'s' * (ranks != 1)}"
    stage = manifest.get("steps", {}).get("DeepSpeed ZeRO stage")
    return f"step {state.get('global_step')} of {state.get('max_steps')}{of_ranks}" + (
        "" if stage is None else f" under ZeRO-{stage}"
    )


def refuse_nameless(path) -> None:
    """Raise OSError for the state of a run that does not say which model it is a state of."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file() and holds_step(folder):
        raise OSError(
            f"{str(path)!r} holds the state of a run and no config.json that says of which model, as checkpoints from "
            "before there was one: resume the run from it (--resume_from_checkpoint) with --max_steps at its step "
            "and its --output_dir becomes the model."
        )


@contextmanager
def adapter_of_step(path, adapter: Mapping | None = None) -> Iterator[Path]:
    """Give a directory with the LoRA of a checkpoint-N as a finished run leaves it, in the run's dtype.

    adapter: its weights where they are read already.
    """
    adapter = step_weights(path)[1] if adapter is None else adapter
    with _directory(path, {ADAPTER_WEIGHTS: adapter}, lambda name: name == ADAPTER) as folder:
        yield folder


@contextmanager
def step_without_adapter(path) -> Iterator[Path]:
    """Give a directory of what else than LoRA a checkpoint-N had trained, as a finished run leaves it."""
    gone = (ADAPTER, MANIFEST, LATEST, TRAINED)
    with _directory(path, {TRAINED: step_weights(path)[0]}, lambda name: name not in gone) as folder:
        yield folder


@contextmanager
def _directory(path, parts: Mapping[str, Mapping], keeps: Callable[[str], bool]) -> Iterator[Path]:
    """Give a temporary directory with links to the files that `keeps` and with `parts`, {file: weights}."""
    dtype = getattr(torch, read_json(path, "config.json", {}).get("dtype") or "float32")
    with tempfile.TemporaryDirectory() as there:
        for file in Path(path).iterdir():
            if file.is_file() and keeps(file.name):
                (Path(there) / file.name).symlink_to(file.resolve())
        for name, weights in parts.items():
            # A copy each: tied weights share their memory, which a file of weights may not.
            whole = {key: weight.contiguous().to(dtype, copy=True) for key, weight in weights.items()}
            save_file(whole, Path(there) / name, metadata={"format": "pt"})
        yield Path(there)
