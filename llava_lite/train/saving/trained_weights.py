"""Separate the weights that a run trains from those of its base model."""

import re
import zlib
from collections.abc import Mapping

import torch
from torch import nn

from llava_lite.checkpoints.copying import gathered, is_partitioned
from llava_lite.train.deepspeed.experts import with_all_experts

TRAINED = "trained.safetensors"
PROJECTOR = "mm_projector.bin"
IN_PROJECTOR_FILE = re.compile(r"(?:^|\.)(mm_projector\..*|image_(?:newline|start|end))$")
ROWS_OF_TABLE = re.compile(r"(?:^|\.)(model\.embed_tokens|lm_head)\.new_rows$")
_SAMPLES = 64


def trained_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that train, sorted."""
    return sorted(name for name, param in model.named_parameters() if param.requires_grad)


def trained_state(model: nn.Module, keep: bool = True, buffers: bool = True) -> dict[str, torch.Tensor]:
    """Return the trained parameters on the CPU and, if asked for, the saved buffers.

    All ranks must call it under ZeRO-3 and --ep_size; those without `keep` get {}.
    """
    changing = set(trained_names(model)) | ({name for name, _ in model.named_buffers()} if buffers else set())
    state = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        if name in changing:
            with gathered([weight]):
                if keep:
                    state[name] = weight.detach().to("cpu", copy=True).contiguous()
    return with_all_experts(model, state, keep)


def drop_frozen(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `state` without frozen weights, their second names (tied weights) and their quantisation tables."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}

    def comes_from_base(key: str) -> bool:
        # bitsandbytes saves `x.weight.absmax` and the like beside a 4-bit `x.weight`.
        parts = key.split(".")
        return any(".".join(parts[:end]) in frozen for end in range(1, len(parts) + 1))

    return {key: value for key, value in state.items() if not comes_from_base(key)}


def load_trained(model: nn.Module, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Copy saved trained parameters and buffers into the model; every trained parameter must be there.

    Raises ValueError that names what is missing, unknown or of another shape. where: the file, for the message.
    """
    targets = {name: param for name, param in model.named_parameters() if param.requires_grad}
    missing = sorted(set(targets) - set(state))
    targets.update(model.named_buffers())
    unknown = sorted(set(state) - set(targets))
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(targets[name].shape)}"
        for name in sorted(set(state) & set(targets))
        if state[name].shape != targets[name].shape
    ]
    if missing or unknown or shapes:
        raise ValueError(
            f"{where} does not fit what this run trains: missing {missing[:4]} ({len(missing)} in all), unknown "
            f"{unknown[:4]} ({len(unknown)}), other shapes {shapes[:4]} ({len(shapes)}). Resume with the flags of the "
            "run that saved it."
        )
    with torch.no_grad():
        for name, value in state.items():
            targets[name].copy_(value)


def projector_state(model: nn.Module, keep: bool = True) -> dict[str, torch.Tensor]:
    """Return LLaVA's mm_projector.bin, on the CPU: `model.mm_projector.*` and the vectors among image features.

    Rows of new tokens that train beside their matrices are under the names of the matrices, as LLaVA writes them.
    All ranks must call it under ZeRO-3; those without `keep` get {}, as does a model without a connector.
    """
    found, seen = {}, set()
    for name, weight in model.state_dict(keep_vars=True).items():
        part, rows = IN_PROJECTOR_FILE.search(name), ROWS_OF_TABLE.search(name)
        # Of tied embeddings once, as LLaVA does.
        if part or (rows and id(weight) not in seen):
            seen.add(id(weight))
            with gathered([weight]):
                if keep:
                    own_name = f"model.{part.group(1)}" if part else f"{rows.group(1)}.weight"
                    found[own_name] = weight.detach().to("cpu", copy=True)
    return found


def frozen_prints(model: nn.Module, as_first_of: int | None = None) -> dict[str, int]:
    """Return a checksum of 64 evenly spread elements of each frozen weight; under ZeRO-3 of this rank's shard.

    as_first_of: for the shard that the first of so many ranks would hold, 1 for the complete weight; all ranks must
    call it.

    Enough to detect another base model, a tuned tower or a reinitialised layer; hashing all of 7B weights at each
    start would take a minute.
    """
    prints = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            continue
        with gathered([param] if as_first_of else ()):
            weight = param.ds_tensor if is_partitioned(param) and not as_first_of else param
            flat = weight.detach().reshape(-1)
            if as_first_of:
                flat = flat[: -(-flat.numel() // as_first_of)].clone()
        if flat.numel() and not flat.is_meta:
            picked = flat[:: max(1, flat.numel() // _SAMPLES)][: 2 * _SAMPLES].cpu().contiguous()
            prints[name] = zlib.crc32(picked.view(torch.uint8).numpy().tobytes())
    return prints


def check_frozen(now: Mapping[str, int], saved: Mapping[str, int], where: str) -> None:
    """Raise ValueError if a frozen weight is not the one that the checkpoint was trained on."""
    other = sorted(name for name in set(now) | set(saved) if now.get(name) != saved.get(name))
    if other:
        raise ValueError(
            f"{len(other)} of {len(saved)} frozen weights differ from those that {where} was trained on, first "
            f"{other[0]}. A checkpoint holds only what trains: give the same --model_name_or_path, --vision_tower and "
            "--pretrain_mm_mlp_adapter as the run that saved it."
        )
