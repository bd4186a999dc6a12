"""Multiply float32 matrices on the CPU by oneDNN where torch would ask a BLAS that keeps to 256-bit vectors.

torch hands float32 products to MKL, which takes its 256-bit kernels on processors of another maker; the oneDNN that
torch brings along takes the 512-bit ones on any. The same float32 numbers, summed in another order. Measured on one
Zen 5 core with torch 2.13: 190 to 210 GFLOP/s for 90 to 97, forward and in both gradients, from about 8 rows on.
"""

from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

# Below this many rows a product waits for memory, not for arithmetic, and BLAS has the shorter way to it.
LEAST_ROWS = 8
# Below this many multiplications a layer's own autograd function costs more than the kernel saves: toys.
LEAST_WORK = 2**21
# Numbers of a matrix that oneDNN takes at once: it copies what it multiplies by into an order of its own, and of a
# vocabulary's 32,000 rows that copy would be the largest thing in a step.
MOST_NUMBERS = 2**22


@cache
def _has_wide_vectors():
    # torch.compile's own fusion of linear layers; private, hence looked for.
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
    return known and "AVX512" in torch.backends.cpu.get_cpu_capability() and not _is_mkls_own()


def _is_mkls_own():
    """Return whether the processor is of MKL's maker, where MKL is as fast; True where nothing tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return True
    makers = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}
    return not makers or "GenuineIntel" in makers


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


def product(left, right, out=None):
    """Return left [M, K] @ right.T [K, N] of right [N, K], outside autograd; both may be views, transposed too.

    out: [M, N], written if it is given.
    """
    # Of no terms a sum is zero, which oneDNN leaves unwritten.
    if len(left) < LEAST_ROWS or not left.shape[1] or not takes_onednn(left, right):
        return torch.mm(left, right.t(), out=out)
    if max(left.numel(), right.numel()) <= MOST_NUMBERS:
        found = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
        return found if out is None else out.copy_(found)
    return _product_in_parts(left, right, left.new_empty(len(left), len(right)) if out is None else out)


def _product_in_parts(left, right, out):
    """Write left [M, K] @ right.T [K, N] into out, the longest of the three sides cut into parts."""
    num_rows, num_terms, num_columns = len(left), left.shape[1], len(right)
    longest = max(num_rows, num_terms, num_columns)
    step = max(LEAST_ROWS, MOST_NUMBERS * longest // max(left.numel(), right.numel()))
    parts = [slice(start, start + step) for start in range(0, longest, step)]
    if longest == num_terms:
        for part in parts:
            found = product(left[:, part], right[:, part])
            out.copy_(found) if part.start == 0 else out.add_(found)
    else:
        for part in parts:
            rows = part if longest == num_rows else slice(None)
            columns = part if longest != num_rows else slice(None)
            product(left[rows], right[columns], out=out[rows, columns])
    return out


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


def unlearned(inputs, weight, bias=None):
    """Return what F.linear returns, outside autograd, of as few rows as a decoding step has or of many.

    With 170 MB of weights read once a step (one Zen 5 core): 9.2 ms for BLAS's 12.6 at 1 row, 9.6 for 20 at 4, 16 for
    25 at 8.
    """
    rows = inputs.numel() // max(inputs.shape[-1], 1)
    if not rows or weight.numel() < LEAST_WORK // LEAST_ROWS or not takes_onednn(inputs, weight):
        return F.linear(inputs, weight, bias)
    if 1 < rows < 5:
        # The weight on the left, as BLAS likes it best while there are so few columns.
        out = torch.mm(weight, inputs.reshape(rows, -1).t()).t().contiguous().view(*inputs.shape[:-1], -1)
        return out if bias is None else out.add_(bias)
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def linear(inputs, weight, bias=None):
    """Return what F.linear returns, with its gradients; faster where `takes_onednn` says so."""
    if not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
        return unlearned(inputs, weight, bias)
    rows = inputs.numel() // max(inputs.shape[-1], 1)
    small = rows < LEAST_ROWS or rows * weight.numel() < LEAST_WORK
    if small or not takes_onednn(inputs, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(inputs, weight, bias)
    return _Linear.apply(inputs.reshape(rows, -1), weight, bias).view(*inputs.shape[:-1], -1)


class Linear(nn.Linear):
    """torch's linear layer with the faster product."""

    def forward(self, inputs):
        """Return the outputs [..., N] of inputs [..., K]."""
        return linear(inputs, self.weight, self.bias)


def take_faster_products(module) -> None:
    """Make every plain linear layer inside multiply by `linear`; names, weights and what wraps them stay.

    What is quantised, or is another kind of layer for any reason, stays what it is.
    """
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
