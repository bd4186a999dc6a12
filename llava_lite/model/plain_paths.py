"""Name the faster paths of a model, and make a model take the plain one in place of any of them.

For a doubt about a number, and to measure what a path is worth. A class that has a faster path declares
`plain_paths: frozenset[str] = frozenset()` and asks it for the path's name at every call.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

# What the plain ones are: logits of every position, whole, then F.cross_entropy; the function of transformers' experts
# interface.
PLAIN_PATHS = ("loss", "experts")


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
