"""Distribute a model over devices, and find the device of a module whose weights are offloaded.

With `device_map`, `cpu_offload`, `disk_offload` or `dispatch_model` accelerate keeps offloaded weights on the meta
device between calls of the module that holds them, and its hooks move that module's inputs.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn

# Keywords of transformers' `from_pretrained` that place weights.
PLACES = ("device_map", "max_memory", "offload_folder", "offload_buffers")
# Values of device_map with which transformers distributes a model by itself.
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_device(name: str | None) -> None:
    """Raise ValueError for a value of --device that this machine has not; None is any."""
    try:
        is_there = name is None or torch.empty(0, device=name).device.type != "meta"
    except (RuntimeError, AssertionError):
        is_there = False
    if not is_there:
        raise ValueError(f"--device {name}: this machine has {', '.join(list_devices())}.")


def list_devices() -> list[str]:
    """Return the names of the devices of this machine."""
    found = torch.accelerator.current_accelerator(check_available=True)
    names = [] if found is None else [f"{found.type}:{i}" for i in range(torch.accelerator.device_count())]
    return ["cpu", *names]


def get_device(module: nn.Module, otherwise: torch.device) -> torch.device:
    """Return the device of a module's weights; `otherwise` for offloaded weights, or without weights."""
    weight = next(module.parameters(), None)
    return otherwise if weight is None or weight.is_meta else weight.device


@contextmanager
def present(module: nn.Module):
    """Load a module's own offloaded weights for reading them outside its forward call.

    accelerate's align_module_device does this, but not for a hook inside a SequentialHook; hence `_hf_hook` here. A
    module without the attribute has no hook of accelerate.
    """
    hook = getattr(module, "_hf_hook", None)
    is_away = any(weight.is_meta for weight in module.parameters(recurse=False))
    hooks = [one for one in getattr(hook, "hooks", [hook]) if is_away and getattr(one, "offload", False)]
    for one in hooks:
        one.pre_forward(module)
    try:
        yield
    finally:
        for one in hooks:
            one.post_forward(module, None)


def may_offload(device_map) -> bool:
    """Return whether a device map may offload weights to the CPU or the disk."""
    if isinstance(device_map, dict):
        places = set(device_map.values())
        return "disk" in places or ("cpu" in places and len(places) > 1)
    return isinstance(device_map, str) and device_map in SPREADS


def pop_placement(arguments: dict) -> dict:
    """Remove the keywords that may offload weights from `arguments` and return them, {} if there are none."""
    if not may_offload(arguments.get("device_map")):
        return {}
    return {name: arguments.pop(name) for name in PLACES if name in arguments}


def spread(model, device_map, max_memory=None, offload_folder=None, offload_buffers=False):
    """Distribute a model that is on the CPU as transformers' `from_pretrained` would have; return it.

    For weights that come from several checkpoints, which cannot be written into weights on the disk.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    if isinstance(device_map, str):
        kept_together = {"no_split_module_classes": list(model._no_split_modules or [])}
        if device_map != "sequential":
            is_low = device_map == "balanced_low_0"
            max_memory = get_balanced_memory(model, max_memory, low_zero=is_low, **kept_together)
        device_map = infer_auto_device_map(model, max_memory, **kept_together)
    if set(device_map) == {""}:
        # accelerate offloads no weights of a module without a name.
        device_map = dict.fromkeys((name for name, _ in model.named_children()), device_map[""])
    if "disk" in device_map.values() and offload_folder is None:
        raise ValueError(
            "weights of this model go to the disk, by its device map or since they do not fit elsewhere; give "
            "offload_folder=, a directory for them."
        )
    return dispatch_model(
        model,
        device_map,
        offload_dir=offload_folder,
        offload_buffers=offload_buffers,
        skip_keys=model._skip_keys_device_placement,
    )


def is_too_large(model, device: torch.device) -> bool:
    """Return whether a model's weights are larger than the free memory of a CUDA device."""
    if device.type != "cuda":
        return False
    num_bytes = sum(part.numel() * part.element_size() for part in (*model.parameters(), *model.buffers()))
    return num_bytes > torch.cuda.mem_get_info(device)[0]
