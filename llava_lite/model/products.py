"""Multiply float32 matrices on the CPU by oneDNN where torch would ask a BLAS that keeps to 256-bit vectors.

torch hands float32 products to MKL, which takes its 256-bit kernels on processors of another maker; the oneDNN that
torch brings along takes the 512-bit ones on any. The same float32 numbers, summed in another order. Measured on one
Zen 5 core with torch 2.13: 190 to 210 GFLOP/s for 90 to 97, forward and in both gradients, from about 8 rows on.
"""

from functools import cache

import torch
from torch.nn import functional as F

# Below this many rows a product waits for memory, not for arithmetic, and BLAS has the shorter way to it.
LEAST_ROWS = 8


@cache
def _has_wide_vectors():
    # torch.compile's own fusion of linear layers; private, hence looked for.
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return known and torch.backends.mkldnn.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability()


def takes_onednn(*tensors):
    """Return whether a product of these is oneDNN's: float32 on a CPU with 512-bit vectors, run and not traced.

    False in `torch.backends.mkldnn.flags(enabled=False)`, for comparison.
    """
    return (
        all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        and _has_wide_vectors()
        and torch.backends.mkldnn.enabled
        and not torch.compiler.is_compiling()
    )


def product(left, right):
    """Return left [M, K] @ right.T [K, N] of right [N, K], outside autograd; both may be views, transposed too."""
    if len(left) >= LEAST_ROWS and takes_onednn(left, right):
        return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return torch.mm(left, right.t())


class _Linear(torch.autograd.Function):
    """A linear layer whose three products are `product`s."""

    @staticmethod
    def forward(ctx, rows, weight, bias):
        # The weight itself and no view: ZeRO-3 takes its storage away after the forward pass and brings it back.
        ctx.save_for_backward(rows if weight.requires_grad else None, weight)
        out = product(rows, weight)
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        for_rows, for_weight, for_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if for_rows else None,
            product(grad.t(), rows.t()) if for_weight else None,
            grad.sum(dim=0) if for_bias else None,
        )


def linear(inputs, weight, bias=None):
    """Return what F.linear returns, with its gradients; faster where `takes_onednn` says so."""
    rows = inputs.numel() // max(inputs.shape[-1], 1)
    if rows < LEAST_ROWS or not takes_onednn(inputs, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(inputs, weight, bias)
    return _Linear.apply(inputs.reshape(rows, -1), weight, bias).view(*inputs.shape[:-1], -1)
