"""Spread a model over devices, and find where a module computes whose weights are elsewhere or come when needed.

With `device_map`, `cpu_offload`, `disk_offload` or `dispatch_model` accelerate keeps such weights on the meta device
between calls of the module that holds them, and its hooks move that module's inputs.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn

# Keywords of transformers' `from_pretrained` that say where weights lie.
PLACES = ("device_map", "max_memory", "offload_folder", "offload_buffers")
# What transformers calls the ways to spread a model by itself.
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")


def place_of(module: nn.Module, otherwise: torch.device) -> torch.device:
    """Return the device of a module's weights; `otherwise` for weights that come when they are needed, or for none."""
    weight = next(module.parameters(), None)
    return otherwise if weight is None or weight.is_meta else weight.device


@contextmanager
def present(module: nn.Module):
    """Let the weights that a module holds itself be read beside its own call.

    accelerate has a function for this, which does not see a hook among several.
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
    """Tell whether a device map may leave weights where they are only brought from: on the CPU or the disk."""
    if isinstance(device_map, dict):
        places = set(device_map.values())
        return "disk" in places or ("cpu" in places and len(places) > 1)
    return isinstance(device_map, str) and device_map in SPREADS


def take_places(arguments: dict) -> dict:
    """Take the keywords that may offload weights out of others and return them, {} if there are none."""
    if not may_offload(arguments.get("device_map")):
        return {}
    return {name: arguments.pop(name) for name in PLACES if name in arguments}


def spread(model, device_map, max_memory=None, offload_folder=None, offload_buffers=False):
    """Return a model that lies on the CPU, its parts moved as transformers' `from_pretrained` would have laid them.

    For weights that come from several checkpoints: those that are on the disk already could not be filled in.
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
        # accelerate writes no weights of a module without a name.
        device_map = dict.fromkeys((name for name, _ in model.named_children()), device_map[""])
    if "disk" in device_map.values() and offload_folder is None:
        raise ValueError(
            "weights of this model go to the disk, as its device map says or since they do not fit elsewhere; give "
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
    """Tell whether a model's weights are more than the free memory of a CUDA device."""
    if device.type != "cuda":
        return False
    num_bytes = sum(part.numel() * part.element_size() for part in (*model.parameters(), *model.buffers()))
    return num_bytes > torch.cuda.mem_get_info(device)[0]
