"""Name the faster paths of a model, install the optional ones, and make a model take the plain path instead of any.

The plain paths are for checking a number and for measuring what a faster path gains. A class with a faster path
declares `plain_paths: frozenset[str] = frozenset()` and looks the path's name up in it at every call.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

# The plain paths are: F.cross_entropy on the logits of all positions; transformers' function for experts; torch's own
# matrix products on a CPU; no kernel of Liger's on CUDA.
PLAIN_PATHS = ("loss", "experts", "matmul", "liger")


def set_plain_paths(model: nn.Module, names: Iterable[str]) -> None:
    """Make a model, wrapped or not, take the plain path of each of `names` and the faster one of every other.

    Raises ValueError for a name that is not one of PLAIN_PATHS.
    """
    chosen = frozenset(names)
    unknown = sorted(chosen - set(PLAIN_PATHS))
    if unknown:
        raise ValueError(f"unknown plain path {unknown[0]!r}; known: {', '.join(PLAIN_PATHS)}.")
    for module in model.modules():
        if isinstance(getattr(type(module), "plain_paths", None), frozenset):
            module.plain_paths = chosen


def install_fast_paths(module: nn.Module) -> None:
    """Install the faster matrix products in a module that was just made, where `model/fast` exists and gains by it."""
    try:
        from llava_lite.model.fast import install
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("llava_lite.model.fast"):
            raise
        return
    install(module)


def install_training_kernels(model: nn.Module, device) -> None:
    """Install Liger's layers in a decoder that will train on CUDA, unless `liger` is among its plain paths."""
    if device.type != "cuda" or "liger" in model.plain_paths:
        return
    try:
        from llava_lite.model.fast import install_liger
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("llava_lite.model.fast"):
            raise
        return
    install_liger(model)
