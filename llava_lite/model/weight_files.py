"""Find every weights file of a checkpoint, local or on the Hub, and read them as one dict of mapped tensors."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from llava_lite.model.weights import read_weights

logger = logging.getLogger(__name__)

# A checkpoint in one file or in several with an index, safetensors before pickles.
SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"


def find_file(path, name: str, hub: dict) -> str | None:
    """Return the local path of a checkpoint's file, fetched if need be; None if it has none of that name."""
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)


def find_weight_files(path, whole_name: str, hub: dict) -> list[str]:
    """Return the files of a checkpoint saved as `whole_name` or in shards; [] if there are none.

    Raises OSError that names a shard which the index lists and the checkpoint lacks.
    """
    index = find_file(path, f"{whole_name}.index.json", hub)
    if index is None:
        whole = find_file(path, whole_name, hub)
        return [] if whole is None else [whole]
    try:
        shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index!r} is no index of weights ({error!r}). Copy it again.") from error
    outside = [name for name in shards if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise ValueError(
            f"{index!r} names weights outside its folder, such as {outside[:3]}; a checkpoint's files stand beside it."
        )
    found = {name: find_file(path, name, hub) for name in shards}
    absent = [name for name, file in found.items() if file is None]
    if absent:
        raise OSError(
            f"{str(path)!r} lacks {len(absent)} of the {len(shards)} files of weights that its index names, such as "
            f"{absent[:3]}. Copy them beside it."
        )
    return list(found.values())


def read_files(files: list[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of several files by name, mapped where the file allows it."""
    state = {}
    for file in files:
        state.update(read_weights(file))
    return state


def read_weight(path, name: str, hub: dict) -> torch.Tensor | None:
    """Return one weight of a checkpoint, None if it has none of that name."""
    for file in find_weight_files(path, SAFE, hub):
        with safe_open(file, framework="pt") as weights:
            if name in weights.keys():  # noqa: SIM118
                return weights.get_tensor(name)
    return read_files(find_weight_files(path, PICKLED, hub)).get(name)


def read_checkpoint(path, hub: dict) -> dict[str, torch.Tensor]:
    """Return all weights of a checkpoint by name.

    MoE-LLaVA leaves a whole pytorch_model.bin beside safetensors that may lack weights: where the pickle holds all
    names of the safetensors and more, it counts. Raises OSError if there are no weights, ValueError for a broken file.
    """
    safe = read_files(find_weight_files(path, SAFE, hub))
    pickled = read_files(find_weight_files(path, PICKLED, hub))
    if not safe and not pickled:
        raise OSError(
            f"{str(path)!r} holds no weights: no {SAFE} and no {PICKLED}, whole or in shards with an index. Name a "
            "folder with weights, or the base model if it holds only what was trained."
        )
    if pickled.keys() > safe.keys():
        if safe:
            logger.warning(
                "%s holds %d weights in safetensors and %d in %s; the latter are read.",
                path,
                len(safe),
                len(pickled),
                PICKLED,
            )
        return pickled
    return safe or pickled


@contextmanager
def broken_files_in_words(path, hub: dict):
    """Say which file of a checkpoint is broken, or holds code, if transformers could not read it; all else passes."""
    try:
        yield
    except Exception:
        if path is not None:
            for name in (SAFE, PICKLED):
                read_files(find_weight_files(path, name, hub))
        raise
