"""Turn a program's tensors that are sent to a CUDA device into tensors on the CPU, on a machine without one."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

# Methods whose first argument names a device: Tensor.to, and what Module.to reads its own with.
_TAKE_A_DEVICE = ("to", "_parse_to")


class CudaOnCpu(TorchFunctionMode):
    """While it is entered, `.cuda()`, `.to("cuda")` and `device="cuda"` mean the CPU, in this thread.

    For programs that name the device themselves, as those of LLaVA do; `load_pretrained_model` puts the model on the
    CPU where there is no CUDA, and what is handed to it belongs there too.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call a function of torch with every CUDA device among its places replaced."""
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func is torch.Tensor.cuda:
            return args[0].cpu()
        if name in _TAKE_A_DEVICE:
            args = tuple(_on_cpu(value, numbers=True) for value in args)
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"], numbers=True)
        return func(*args, **kwargs)


def _on_cpu(value, numbers: bool = False):
    """Return the CPU in place of a CUDA device, written as text, torch.device or, with `numbers`, as its index."""
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    if isinstance(value, str):
        return "cpu" if value.split(":")[0] == "cuda" else value
    return "cpu" if numbers and isinstance(value, int) and not isinstance(value, bool) else value
