"""The matrix products of the vocabulary head and the experts: torch's own, unless model/fast installs others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F


def linear(inputs, weight, bias=None) -> torch.Tensor:
    """Return inputs [..., K] @ weight.T [K, N] + bias [N], with gradients."""
    # Looked up at the call: DeepSpeed puts another function in its place under ZeRO-3.
    return F.linear(inputs, weight, bias)


def product(rows, weight, bias=None) -> torch.Tensor:
    """Return rows [R, K] @ weight.T [K, N] + bias [N], outside autograd; all may be views, transposed too."""
    return rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())


def weight_gradient(grad, rows, out=None) -> torch.Tensor:
    """Return grad.T [N, R] @ rows [R, K], outside autograd; out: [N, K], written if it is given."""
    return torch.mm(grad.t(), rows, out=out)


@dataclass(frozen=True)
class Matmul:
    """The functions of this file, or others with the same arguments and results."""

    linear: Callable
    linear_no_grad: Callable
    product: Callable
    weight_gradient: Callable


TORCH = Matmul(linear, linear, product, weight_gradient)


class UsesMatmul:
    """A module that multiplies by `self.matmul`; see plain_paths.py for `plain_paths`."""

    plain_paths: frozenset[str] = frozenset()
    # Set by model/fast where that is installed and the processor gains by it.
    fast_matmul: Matmul | None = None

    @property
    def matmul(self) -> Matmul:
        """The matmul to use: the installed one; torch's own without any, or under the plain path `matmul`."""
        return TORCH if self.fast_matmul is None or "matmul" in self.plain_paths else self.fast_matmul

    def multiply_like(self, module) -> None:
        """Use the products, and the plain paths, of a module that this one replaces."""
        if isinstance(module, UsesMatmul):
            self.fast_matmul, self.plain_paths = module.fast_matmul, module.plain_paths


def share_weights(new, layer):
    """Return `new`, a layer made on the meta device, with the very parameters of `layer` and in its mode.

    The parameters and not copies: tied layers, ZeRO-3 and optimizers know them by identity.
    """
    new.weight = layer.weight
    if getattr(layer, "bias", None) is not None:
        new.bias = layer.bias
    # transformers' private note that a layer has its weights; without it `post_init` would draw them again.
    if getattr(layer, "_is_hf_initialized", False):
        new._is_hf_initialized = True
    return new.train(layer.training)
