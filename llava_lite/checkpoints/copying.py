"""Copy weights into a module and out of it, full or partitioned by ZeRO-3."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from llava_lite.checkpoints.manifest import verify_file
from llava_lite.hub.pickles import PackedPickle, load_pickle

logger = logging.getLogger(__name__)


def is_partitioned(param: torch.Tensor) -> bool:
    """Tell whether ZeRO-3 keeps only this rank's shard of the parameter."""
    return hasattr(param, "ds_id")


def own_part(param: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a weight: all, or under ZeRO-3 its part [n], without the fill after its end."""
    part = getattr(param, "ds_tensor", None)
    if part is None:
        return param
    num_filled = param.ds_numel - torch.distributed.get_rank(param.ds_process_group) * part.numel()
    return part.reshape(-1)[: max(0, num_filled)]


def clear_fill(params: Iterable[torch.Tensor]) -> None:
    """Set the fill of ZeRO-3's parts to 0: the last ranks' parts end with memory that DeepSpeed (0.19.8) never writes.

    The master weights are copied from it, and a NaN in it would pass for one of the run.
    """
    for param in params:
        part = getattr(param, "ds_tensor", None)
        if part is not None:
            with torch.no_grad():
                part.reshape(-1)[own_part(param).numel() :].zero_()


def gathered(params: Iterable[torch.Tensor], modify: bool = False) -> AbstractContextManager:
    """Return a context in which `params` are full; under ZeRO-3 this is a collective of all ranks.

    modify: rank 0's values are broadcast to all when the context ends. Without ZeRO-3 nothing happens.
    """
    partitioned = [p for p in params if is_partitioned(p)]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if modify else None)


def load_into(module: nn.Module, state_dict: Mapping[str, torch.Tensor], what: str) -> None:
    """Copy `state_dict` into `module`, every key accounted for.

    what: names the weights in errors, e.g. "connector weights of 'mm_projector.bin'". Raises ValueError with the
    names if keys are missing or unexpected or a shape differs.
    """
    # Non-persistent buffers (position ids) are saved by old checkpoints and made by the constructor in new ones.
    targets = dict(module.named_parameters())
    targets.update({name: b for name, b in module.named_buffers() if name in module.state_dict()})
    buffers = {name for name, _ in module.named_buffers()}
    missing = [k for k in targets if k not in state_dict]
    unexpected = [k for k in state_dict if k not in targets and k not in buffers]
    if missing or unexpected:
        raise ValueError(
            f"{what} do not fit {type(module).__name__}: missing {missing[:8]} ({len(missing)} in all), "
            f"unexpected {unexpected[:8]} ({len(unexpected)} in all). Give weights made for this configuration."
        )
    copy_weights(targets, state_dict, what)


def copy_weights(targets: Mapping[str, torch.Tensor], state_dict: Mapping[str, torch.Tensor], what: str) -> None:
    """Copy the weights of the same names into `targets`, full or partitioned; ValueError if a shape differs."""
    check_shapes(targets, state_dict, what)
    with torch.no_grad(), gathered(targets.values(), modify=True):
        for name, target in targets.items():
            if target.numel():
                # One by one: a weight of a ZeRO-3 checkpoint is put together only here.
                target.copy_(state_dict[name].contiguous())


def check_shapes(targets: Mapping[str, torch.Tensor], state_dict: Mapping[str, torch.Tensor], what: str) -> None:
    """Raise ValueError with both shapes for the first weight whose shape differs, or that is offloaded."""
    for name, target in targets.items():
        if target.is_meta:
            # Copying to it would change nothing, without an error.
            raise ValueError(
                f"{what}: {name} is offloaded (on the meta device), so nothing can be put into it. Fill the model in "
                "before it is spread over devices."
            )
        shape = tuple(getattr(target, "ds_shape", target.shape))
        if tuple(state_dict[name].shape) != shape:
            raise ValueError(
                f"{what}: {name} has shape {tuple(state_dict[name].shape)}, the model expects {shape}. "
                "They were made for another model width; train the connector for this model or name the right file."
            )


def full_state_dict(module: nn.Module, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Return CPU copies of the named parameters and buffers (all if None), full on every rank.

    Under ZeRO-3 every rank must call this, since parameters are gathered one by one.
    """
    wanted = None if names is None else set(names)
    copies = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if wanted is None or name in wanted:
            with gathered([tensor]):
                copies[name] = tensor.detach().to("cpu", copy=True)
    return copies


def read_weights(path: str | Path, is_verified: bool = False) -> dict[str, torch.Tensor]:
    """Read one weights file, mapped where it can be: .safetensors, or a pickle of tensors under `weights_only`.

    A file of a checkpoint-N is compared with its manifest, unless the caller has (is_verified). Raises ValueError for
    a file that is broken, cut short or another than was saved, and for a pickle that holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {str(path)!r}; give the path of a .safetensors or .bin file.")
    if not is_verified:
        verify_file(path)
    with readable(path):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = dict(load_pickle(path, mmap=True))
    strange = [name for name, value in state.items() if not isinstance(value, torch.Tensor)] if state else []
    if strange:
        raise ValueError(f"{str(path)!r} holds more than named tensors: {strange[:5]}. Name a file of weights alone.")
    return state


@contextmanager
def readable(path: Path, what: str = "weights") -> Iterator[None]:
    """Raise ValueError with the reason for a file that cannot be read as `what` within the block."""
    try:
        yield
    except PackedPickle:
        raise
    # On a broken file the readers raise nearly everything: struct.error, EOFError, SafetensorError, ...
    except Exception as error:
        raise ValueError(f"{str(path)!r} cannot be read as {what} ({what_broke(path, error)}") from error


def what_broke(path: Path, error: Exception) -> str:
    """Return why a weights file cannot be read and what to do: the rest of a sentence with an open bracket."""
    found = re.search(r"GLOBAL (\w+(\.\w+)*) (was|whose)", str(error))
    if found:
        return (
            f"{type(error).__name__}): it is a pickle with code in it, {found[1]}, which opening it would run. "
            "Ask whoever wrote it for a safetensors file."
        )
    with path.open("rb") as stream:
        start = stream.read(20)
    if start == b"version https://git-":
        return "it is a git-lfs pointer): the weights were not fetched. Run git lfs pull beside it."
    # torch's message of an UnpicklingError advises to open the file without weights_only.
    message = (
        "no tensors" if isinstance(error, pickle.UnpicklingError) else (str(error).splitlines() or ["no bytes"])[0]
    )
    reason = f"{type(error).__name__}: {message}"
    cut = ("incomplete metadata", "invalid header length", "EOF", "finding central directory")
    if any(word in str(error) for word in cut) or (start[:2] == b"PK" and not zipfile.is_zipfile(path)) or not start:
        reason += f"; it is cut short after {path.stat().st_size} bytes"
    return f"{reason}). Copy it again, or name the right file."
