"""Find the weights files of a checkpoint, local or on the Hub, and read them as one dict of mapped tensors.

In every function `checkpoint` is a `source.Checkpoint`.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from llava_lite.checkpoints.copying import read_weights
from llava_lite.hub.json_files import read_json
from llava_lite.hub.pickles import check_unpacked_size

logger = logging.getLogger(__name__)

# A checkpoint in one file or in several with an index, safetensors before pickles.
SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
COMPLETE = (SAFE, f"{SAFE}.index.json", PICKLED, f"{PICKLED}.index.json")
# Files of trained weights; where several hold a weight, the first counts.
PROJECTOR = "mm_projector.bin"
TRAINED = ("trained.safetensors", "non_lora_trainables.bin", PROJECTOR)
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")


def find_base(base: str, path) -> str:
    """Return the base of a partial directory as it can be opened: as named, else beside the directory.

    Raises OSError if it is the path of a directory that is not there.
    """
    beside = Path(path) / base
    is_beside = not Path(base).exists() and not Path(base).is_absolute() and beside.exists()
    found = str(beside) if is_beside else base
    if Path(found).is_absolute() and not Path(found).exists():
        raise OSError(
            f"{str(path)!r} holds only what was trained; its base {base!r} is not there. Move the base back, name it "
            "(load_pretrained_model(..., model_base=...), or base_model_name_or_path in its config.json), or train "
            "with --save_full True."
        )
    return found


def find_weight_files(checkpoint, full_name: str, is_wanted=None) -> list[str]:
    """Return the files of a checkpoint saved as `full_name` or in shards; [] if there are none.

    is_wanted: tells by the name of a weight whether it is needed; shards without any are left out, and not fetched.
    Raises OSError with the shards that the index lists and the checkpoint lacks.
    """
    index = checkpoint.file(f"{full_name}.index.json")
    if index is None:
        single = checkpoint.file(full_name)
        return [] if single is None else [single]
    try:
        weight_map = read_json(index)["weight_map"]
        shards = sorted({shard for name, shard in weight_map.items() if is_wanted is None or is_wanted(name)})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index!r} is no index of weights ({error!r}). Copy it again.") from error
    outside = [name for name in shards if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise ValueError(
            f"{index!r} names weights outside its directory, such as {outside[:3]}; a checkpoint's files "
            "stand beside it."
        )
    found = {name: checkpoint.file(name) for name in shards}
    absent = [name for name, file in found.items() if file is None]
    if absent:
        raise OSError(
            f"{checkpoint.path!r} lacks {len(absent)} of the {len(shards)} files of weights that its index names, "
            f"such as {absent[:3]}. Copy them beside it."
        )
    return list(found.values())


def read_files(files: list[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of several files by name, mapped where the file allows it."""
    return {name: tensor for file in files for name, tensor in read_weights(file).items()}


def read_weight(checkpoint, name: str) -> torch.Tensor | None:
    """Return one weight of a checkpoint, None if it has none of that name."""
    for file in find_weight_files(checkpoint, SAFE):
        with safe_open(file, framework="pt") as weights:
            if name in weights.keys():  # noqa: SIM118
                return weights.get_tensor(name)
    return read_files(find_weight_files(checkpoint, PICKLED)).get(name)


def read_checkpoint(checkpoint) -> dict[str, torch.Tensor]:
    """Return all weights of a checkpoint by name.

    MoE-LLaVA leaves a complete pytorch_model.bin beside safetensors that may lack weights: if the pickle holds all
    names of the safetensors and more, it is read. Raises OSError if there are no weights, ValueError for a broken
    file.
    """
    safe = read_files(find_weight_files(checkpoint, SAFE))
    pickled = read_files(find_weight_files(checkpoint, PICKLED))
    if not safe and not pickled:
        raise OSError(
            f"{checkpoint.path!r} holds no weights: no {SAFE} and no {PICKLED}, in one file or in shards with an "
            "index. Name a "
            "directory with weights, or the base model if it holds only what was trained."
        )
    if pickled.keys() > safe.keys():
        if safe:
            logger.warning(
                "%s holds %d weights in safetensors and %d in %s; the latter are read.",
                checkpoint,
                len(safe),
                len(pickled),
                PICKLED,
            )
        return pickled
    return safe or pickled


@contextmanager
def readable_file_errors(checkpoint):
    """Name the file of a checkpoint that is broken, or holds code, if transformers could not read it."""
    try:
        yield
    except Exception:
        for name in (SAFE, PICKLED):
            read_files(find_weight_files(checkpoint, name))
        raise


def check_before_opening(checkpoint) -> None:
    """Raise ValueError for a file that transformers would read with the weights, and that is not within our bounds.

    transformers looks for an adapter_config.json beside any weights.
    """
    checkpoint.read_json(ADAPTER)
    for name in (SAFE, PICKLED):
        for file in find_weight_files(checkpoint, name):
            if not file.endswith(".safetensors"):
                check_unpacked_size(file)


def read_shapes(checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of a checkpoint by name; of safetensors only the headers are read."""
    files = find_weight_files(checkpoint, SAFE) or find_weight_files(checkpoint, PICKLED)
    with readable_file_errors(checkpoint):
        return {name: shape for file in files for name, shape in read_file_shapes(file).items()}


def read_trained_shapes(checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight in the files of what was trained, by the names in them."""
    files = [file for name in TRAINED if (file := checkpoint.file(name)) is not None]
    return {name: shape for file in files for name, shape in read_file_shapes(file).items()}


def read_file_shapes(file: str) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of one weights file."""
    if file.endswith(".safetensors"):
        with safe_open(file, framework="pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    return {name: tuple(weight.shape) for name, weight in read_weights(file).items()}
