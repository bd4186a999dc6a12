"""The private operations of torch that this package calls; each is looked for and has a plain path without it."""

from __future__ import annotations

import torch


def find_linear_pointwise():
    """Return oneDNN's linear layer, which torch.compile uses for fused layers, or None: then torch's own products.

    Private since no public function of torch chooses oneDNN over the BLAS for float32 products.
    """
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def is_graph_kept() -> bool:
    """Return whether the running backward pass may be repeated (retain_graph); True if this torch cannot tell.

    Private since autograd has no public question for it; the functions that torch.compile makes ask the same way.
    With True, saved tensors are copied before they are overwritten.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()
