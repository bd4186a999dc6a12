"""Apply the activation between an expert's two products, act(gate) * up or act alone, and its gradient.

Shapes: `R` rows of one expert or of all, `I` width of an expert.
"""

from dataclasses import dataclass
from functools import partial

import torch

_aten = torch.ops.aten
# By config.hidden_act: (input, out=) and (gradient, input, grad_input=). Other activations are left to autograd.
KERNELS = {
    "silu": (_aten.silu.out, _aten.silu_backward.grad_input),
    "gelu": (_aten.gelu.out, _aten.gelu_backward.grad_input),
    "gelu_pytorch_tanh": (
        partial(_aten.gelu.out, approximate="tanh"),
        partial(_aten.gelu_backward.grad_input, approximate="tanh"),
    ),
}
KERNELS["gelu_new"] = KERNELS["gelu_pytorch_tanh"]
# Elements of a block of rows on the CPU, so that the block stays in a core's cache from one step to the next.
BLOCK = 2**16


@dataclass(frozen=True)
class ExpertActivation:
    """The activation of an expert, gated or not."""

    gated: bool
    name: str
    module: torch.nn.Module

    def hidden(self, inner):
        """Return the hidden rows [R, I] of inner rows, [R, 2I] if gated, else [R, I]."""
        result = inner.new_empty(len(inner), self._width(inner))
        for rows in self._blocks(inner):
            gate, up = self._halves(inner[rows])
            self._activate(gate, result[rows])
            if self.gated:
                result[rows].mul_(up)
        return result

    def back(self, inner, grad, weights, dtype, into):
        """Return the hidden rows, recomputed, and the gradient of the row weights, [R], in `dtype`.

        grad: gradient of hidden rows of weight 1, [R, I]; overwritten. weights: of the rows, [R, 1]. into: where the
        gradient of the inner rows is written; may be `inner`.
        """
        hidden, activated = torch.empty_like(grad), torch.empty_like(grad[: self._step(inner)])
        dots = torch.empty(len(inner), dtype=dtype, device=inner.device)
        for rows in self._blocks(inner):
            (gate, up), (d_gate, d_up) = self._halves(inner[rows]), self._halves(into[rows])
            of_hidden, product, act = grad[rows], hidden[rows], activated[: len(gate)]
            self._activate(gate, act)
            torch.mul(act, up, out=product) if self.gated else product.copy_(act)
            torch.sum(of_hidden * product, dim=1, dtype=dtype, out=dots[rows])
            of_hidden.mul_(weights[rows])
            if self.gated:
                act.mul_(of_hidden)
                of_hidden.mul_(up)
                d_up.copy_(act)
            self._activate_back(of_hidden, gate, d_gate)
        return hidden, dots

    def _width(self, inner):
        return inner.shape[1] // 2 if self.gated else inner.shape[1]

    def _halves(self, inner):
        return inner.chunk(2, dim=1) if self.gated else (inner, None)

    def _step(self, inner):
        return max(1, len(inner) if inner.is_cuda else BLOCK // self._width(inner))

    def _blocks(self, inner):
        step = self._step(inner)
        return [slice(start, start + step) for start in range(0, len(inner), step)]

    def _activate(self, rows, out):
        if self.name in KERNELS:
            KERNELS[self.name][0](rows, out=out)
        else:
            out.copy_(self.module(rows))

    def _activate_back(self, grad, rows, out):
        if self.name in KERNELS:
            KERNELS[self.name][1](grad, rows, grad_input=out)
            return
        with torch.enable_grad():
            rows = rows.detach().requires_grad_()
            out.copy_(torch.autograd.grad(self.module(rows), rows, grad)[0])
