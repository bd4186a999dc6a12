"""Multiply float32 matrices on the CPU by oneDNN where torch would ask a BLAS that keeps to 256-bit vectors.

torch hands float32 products to MKL, which takes its 256-bit kernels on processors of another maker; the oneDNN that
torch brings along takes the 512-bit ones on any. The same float32 numbers, summed in another order. Measured on one
Zen 5 core with torch 2.13: 190 to 210 GFLOP/s for 90 to 97, forward and in the gradient of the inputs, 140 to 170 in
that of the weight. A second derivative is refused.
"""

from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# oneDNN makes a kernel for every shape that it meets: 3 to 6 ms, and half a megabyte for as long as the run lasts.
# Tokens come in any number, so they are multiplied in pieces of these many, the last one filled up with zeros.
PIECES = (1024, 768, 512, 384, 256, 192, 128, 64)
# What a piece costs beside its tokens, in tokens: the weight is put in another order, the sum written once more.
COST_OF_PIECE = 32
# Below this many multiplications a layer's own autograd function costs more than the kernel saves: toys.
LEAST_WORK = 2**21
# Below this many numbers of a weight, and of rows, BLAS has the shorter way outside autograd too.
LEAST_WEIGHT, LEAST_ROWS = 2**18, 5
# Numbers of a weight that oneDNN takes at once: it copies them into an order of its own, and of a vocabulary's 32,000
# rows that copy would be the largest thing in a step.
MOST_NUMBERS = 2**22


@cache
def has_wide_vectors() -> bool:
    """Return whether oneDNN has float32 kernels here that torch's BLAS has not."""
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
        # First: a compiler shall not look into what follows.
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
    pieces = pieces_of(len(rows), PIECES)
    if len(pieces) == 1 and weight.numel() <= MOST_NUMBERS:
        return _onednn(_filled(rows, pieces[0][1]), weight, bias)[: len(rows)]
    out = rows.new_empty(len(rows), len(weight))
    for columns, terms in _parts_of(weight):
        some_weight, some_bias = weight[columns, terms], None if bias is None else bias[columns]
        for piece, size in pieces:
            into = out[piece, columns]
            if terms.start == 0:
                into.copy_(_onednn(_filled(rows[piece, terms], size), some_weight, some_bias)[: len(into)])
            else:
                into.add_(_onednn(_filled(rows[piece, terms], size), some_weight)[: len(into)])
    return out


def weight_gradient(grad, rows, out=None):
    """Return grad.T [N, T] @ rows [T, K], outside autograd; out: [N, K], written if it is given."""
    if len(rows) < PIECES[-1] or not grad.shape[1] or not rows.shape[1] or not takes_onednn(grad, rows):
        return torch.mm(grad.t(), rows, out=out)
    is_first = True
    for piece, size in pieces_of(len(rows), PIECES):
        found = _onednn(_filled(grad[piece], size).t(), _dense(_filled(rows[piece], size)).t())
        if is_first:
            out = found if out is None else out.copy_(found)
        else:
            out.add_(found)
        is_first = False
    return out


def _onednn(rows, weight, bias=None):
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


@lru_cache(maxsize=4096)
def pieces_of(count, sizes):
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


def _filled(rows, size):
    return rows if len(rows) == size else F.pad(rows, (0, 0, 0, size - len(rows)))


def _dense(matrix):
    """Return the matrix, copied if its numbers lie apart: oneDNN multiplies by such a one 700 times as slowly."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def _parts_of(weight):
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


def unlearned(inputs, weight, bias=None):
    """Return what F.linear returns, outside autograd, of as few rows as a decoding step has or of many.

    With 170 MB of weights read once a step (one Zen 5 core): 9.2 ms for BLAS's 12.6 at 1 row, 9.6 for 20 at 4, 16 for
    25 at 8.
    """
    rows = inputs.numel() // max(inputs.shape[-1], 1)
    if not rows or weight.numel() < LEAST_WEIGHT or not takes_onednn(inputs, weight):
        return F.linear(inputs, weight, bias)
    if rows >= PIECES[-1]:
        return product(inputs.reshape(rows, -1), weight, bias).view(*inputs.shape[:-1], -1)
    if 1 < rows < LEAST_ROWS:
        # The weight on the left, as BLAS likes it best while there are so few columns.
        out = torch.mm(weight, inputs.reshape(rows, -1).t()).t().contiguous().view(*inputs.shape[:-1], -1)
        return out if bias is None else out.add_(bias)
    return _onednn(inputs, weight, bias)


def linear(inputs, weight, bias=None):
    """Return what F.linear returns, with its gradients; faster where `takes_onednn` says so."""
    if not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
        return unlearned(inputs, weight, bias)
    rows = inputs.numel() // max(inputs.shape[-1], 1)
    small = rows < PIECES[-1] or rows * weight.numel() < LEAST_WORK
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
