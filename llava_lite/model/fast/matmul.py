"""Multiply float32 matrices on the CPU by oneDNN where torch would call a BLAS that uses 256-bit vectors.

torch hands float32 products to MKL, which runs its 256-bit kernels on processors of other makers than Intel; oneDNN,
which torch includes, runs the 512-bit ones on any. The same float32 numbers, summed in another order. Measured on one
Zen 5 core with torch 2.13: 190 to 210 GFLOP/s against 90 to 97, forward and in the gradient of the inputs, 140 to 170
in that of the weight. A second derivative raises RuntimeError.
"""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llava_lite.model.matmul import Matmul, UsesMatmul, share_weights
from llava_lite.model.torch_private import find_linear_pointwise

# oneDNN compiles a kernel for every new shape: 3 to 6 ms, and half a megabyte until the process ends. Batches have any
# number of tokens, so they are multiplied in pieces of these sizes, the last one padded with zeros.
PIECES = (1024, 768, 512, 384, 256, 192, 128, 64)
# Overhead of a piece, in tokens: the weight is reordered and the sum is written once more.
COST_OF_PIECE = 32
# Below this many multiplications an autograd function in Python costs more than the kernel saves, as in toys.
LEAST_WORK = 2**21
# Below this many elements of a weight, and this many rows, BLAS is faster outside autograd too.
LEAST_WEIGHT, LEAST_ROWS = 2**18, 5
# Elements of a weight in one product: oneDNN copies them into its own layout, and for a vocabulary of 32,000 rows
# that copy would be the largest tensor of a step.
MOST_NUMBERS = 2**22


@cache
def has_wide_vectors() -> bool:
    """Return whether oneDNN has faster float32 kernels than torch's BLAS on this processor."""
    has_kernel = find_linear_pointwise() is not None
    return has_kernel and "AVX512" in torch.backends.cpu.get_cpu_capability() and not _is_intel()


def _is_intel():
    """Return whether the processor is Intel's, where MKL is as fast; True where /proc/cpuinfo cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return True
    makers = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}
    return not makers or "GenuineIntel" in makers


def takes_onednn(*tensors):
    """Return whether oneDNN multiplies these: float32 on a CPU with 512-bit vectors, executed and not traced.

    False in `torch.backends.mkldnn.flags(enabled=False)`, for comparison.
    """
    return (
        # First, so that a compiler does not trace what follows.
        not torch.compiler.is_compiling()
        and all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        and has_wide_vectors()
        and torch.backends.mkldnn.enabled
    )


def product(rows, weight, bias=None):
    """Return rows [T, K] @ weight.T [K, N] + bias [N], outside autograd; all may be views, transposed too."""
    if len(rows) < PIECES[-1] or not rows.shape[1] or not takes_onednn(rows, weight):
        return rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
    weight = _dense(weight)
    pieces = split_into_pieces(len(rows), PIECES)
    if len(pieces) == 1 and weight.numel() <= MOST_NUMBERS:
        return _onednn(_padded(rows, pieces[0][1]), weight, bias)[: len(rows)]
    out = rows.new_empty(len(rows), len(weight))
    for columns, terms in _get_parts(weight):
        some_weight, some_bias = weight[columns, terms], None if bias is None else bias[columns]
        for piece, size in pieces:
            into = out[piece, columns]
            if terms.start == 0:
                into.copy_(_onednn(_padded(rows[piece, terms], size), some_weight, some_bias)[: len(into)])
            else:
                into.add_(_onednn(_padded(rows[piece, terms], size), some_weight)[: len(into)])
    return out


def weight_gradient(grad, rows, out=None):
    """Return grad.T [N, T] @ rows [T, K], outside autograd; out: [N, K], written if it is given."""
    if len(rows) < PIECES[-1] or not grad.shape[1] or not rows.shape[1] or not takes_onednn(grad, rows):
        return torch.mm(grad.t(), rows, out=out)
    is_first = True
    for piece, size in split_into_pieces(len(rows), PIECES):
        found = _onednn(_padded(grad[piece], size).t(), _dense(_padded(rows[piece], size)).t())
        if is_first:
            out = found if out is None else out.copy_(found)
        else:
            out.add_(found)
        is_first = False
    return out


def _onednn(rows, weight, bias=None):
    return find_linear_pointwise()(rows, weight, bias, "none", [], "")


@lru_cache(maxsize=4096)
def split_into_pieces(count, sizes):
    """Return (slice of `count` tokens, one of the descending sizes) at the least cost; the last may be shorter."""
    num_largest = max(count // sizes[0] - 1, 0)
    chosen = (sizes[0],) * num_largest + _cheapest(count - num_largest * sizes[0], sizes)[1]
    starts = accumulate(chosen, initial=0)
    return tuple((slice(start, min(start + size, count)), size) for start, size in zip(starts, chosen, strict=False))


@lru_cache(maxsize=4096)
def _cheapest(count, sizes):
    if count <= 0:
        return 0, ()
    rests = ((size, _cheapest(count - size, sizes[i:])) for i, size in enumerate(sizes))
    return min((size + COST_OF_PIECE + cost, (size, *rest)) for size, (cost, rest) in rests)


def _padded(rows, size):
    return rows if len(rows) == size else F.pad(rows, (0, 0, 0, size - len(rows)))


def _dense(matrix):
    """Return the matrix, copied if its elements are not adjacent: oneDNN would be 700 times slower with such a one."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def _get_parts(weight):
    """Return (slice of N, slice of K) that cut a dense weight [N, K] into dense parts of at most MOST_NUMBERS."""
    num_columns, num_terms = weight.shape
    if weight.is_contiguous():
        step = max(MOST_NUMBERS // num_terms, 1)
        return [(slice(start, start + step), slice(0, num_terms)) for start in range(0, num_columns, step)]
    step = max(MOST_NUMBERS // num_columns, 1)
    return [(slice(0, num_columns), slice(start, start + step)) for start in range(0, num_terms, step)]


class _Linear(torch.autograd.Function):
    """A linear layer whose three products are `product`s."""

    @staticmethod
    def forward(ctx, rows, weight, bias):
        # The weight itself and no view: ZeRO-3 takes its storage away after the forward pass and brings it back.
        ctx.save_for_backward(rows if weight.requires_grad else None, weight)
        return product(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        for_rows, for_weight, for_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if for_rows else None,
            weight_gradient(grad, rows) if for_weight else None,
            grad.sum(dim=0) if for_bias else None,
        )


def linear_no_grad(inputs, weight, bias=None):
    """Return what F.linear returns, outside autograd; for the few rows of a decode step and for many.

    With 170 MB of weights read once a step (one Zen 5 core): 9.2 ms against BLAS's 12.6 at 1 row, 9.6 against 20 at 4,
    16 against 25 at 8.
    """
    rows = inputs.numel() // max(inputs.shape[-1], 1)
    if not rows or weight.numel() < LEAST_WEIGHT or not takes_onednn(inputs, weight):
        return F.linear(inputs, weight, bias)
    if rows >= PIECES[-1]:
        return product(inputs.reshape(rows, -1), weight, bias).view(*inputs.shape[:-1], -1)
    if 1 < rows < LEAST_ROWS:
        # The weight on the left: BLAS is fastest so while there are few columns.
        out = torch.mm(weight, inputs.reshape(rows, -1).t()).t().contiguous().view(*inputs.shape[:-1], -1)
        return out if bias is None else out.add_(bias)
    return _onednn(inputs, weight, bias)


def linear(inputs, weight, bias=None):
    """Return what F.linear returns, with its gradients; faster where `takes_onednn` says so."""
    if not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
        return linear_no_grad(inputs, weight, bias)
    rows = inputs.numel() // max(inputs.shape[-1], 1)
    small = rows < PIECES[-1] or rows * weight.numel() < LEAST_WORK
    if small or not takes_onednn(inputs, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(inputs, weight, bias)
    return _Linear.apply(inputs.reshape(rows, -1), weight, bias).view(*inputs.shape[:-1], -1)


ONEDNN = Matmul(linear, linear_no_grad, product, weight_gradient)


class Linear(nn.Linear):
    """torch's linear layer, multiplied by oneDNN."""

    plain_paths: frozenset[str] = frozenset()

    @classmethod
    def sharing(cls, layer: nn.Linear) -> Linear:
        """Return a layer that holds the very parameters of another one."""
        made = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        return share_weights(made, layer)

    def forward(self, inputs):
        """Return the outputs [..., N] of inputs [..., K]."""
        return super().forward(inputs) if "matmul" in self.plain_paths else linear(inputs, self.weight, self.bias)


def install(module: nn.Module) -> None:
    """Multiply by oneDNN in a module's float32 layers on the CPU, where this processor gains by it.

    Every plain nn.Linear inside is replaced by a `Linear` with the same parameters; heads and experts get `ONEDNN`.
    Names and weights stay. A layer of any other class, a quantised one for instance, stays as it is.
    """
    if not has_wide_vectors():
        return
    for parent in module.modules():
        if isinstance(parent, UsesMatmul):
            parent.fast_matmul = ONEDNN
        for name, layer in list(parent.named_children()):
            if can_replace(layer):
                parent.add_module(name, Linear.sharing(layer))


def can_replace(layer: nn.Module) -> bool:
    """Return whether a layer is torch's own, float32 on the CPU, and called by nobody else's wrapper."""
    # accelerate, which brings offloaded weights, replaces the forward of the instance.
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    return (
        type(layer.weight) is nn.Parameter
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
    )
