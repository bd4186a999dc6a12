"""Run the steps of a decoder layer between its products with fewer passes over memory, and keep less for the gradient.

RMSNorm (Zhang and Sennrich 2019), SwiGLU (Shazeer 2020) and rotary positions (Su et al. 2021) as transformers computes
them, casts included. On CUDA Liger's kernels run where they are installed. A second derivative is refused.

B batch, L positions, H heads, D width of what is normed, Dh width of a head, R of its dimensions that rotate, I width
of an MLP.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from types import SimpleNamespace

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@cache
def _liger():
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import functional

    return SimpleNamespace(norm=functional.liger_rms_norm, gate=functional.liger_swiglu, rotate=functional.liger_rope)


def liger_for(device: torch.device):
    """Return Liger's functions (norm, gate, rotate), None where they are not installed or the device is not CUDA."""
    return _liger() if device.type == "cuda" else None


def rms_norm(inputs, weight, eps: float) -> torch.Tensor:
    """Return inputs [..., D] over their root mean square in float32, cast back, times weight [D]."""
    liger = liger_for(inputs.device)
    if liger is not None:
        # Llama's casting; the gradient that comes in is left as it is.
        return liger.norm(inputs, weight, eps, 0.0, "llama", False)
    if has_kernel(inputs, weight):
        # Autocast would norm in float32 and return that, where transformers' own returns what came in.
        with torch.autocast(inputs.device.type, enabled=False):
            return F.rms_norm(inputs, weight.shape, weight, eps)
    return _RmsNorm.apply(inputs, weight, eps)


def has_kernel(inputs, weight) -> bool:
    """Return whether torch norms these in one kernel of its own, which keeps as little: on CUDA, of one dtype."""
    return inputs.device.type == "cuda" and inputs.dtype == weight.dtype


class _RmsNorm(torch.autograd.Function):
    """Keeps the inputs and one number a row; torch's own composition keeps the normed rows too."""

    @staticmethod
    def forward(ctx, inputs, weight, eps):
        wide = inputs.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # [..., 1]
        scale = scale.square_().div_(inputs.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(inputs, weight, scale)
        normed = (wide * scale).to(inputs.dtype)
        return normed.mul_(weight) if normed.dtype == weight.dtype else normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs, weight, scale = ctx.saved_tensors
        for_inputs, for_weight, _ = ctx.needs_input_grad
        width = inputs.shape[-1]
        rows, grad, scale = inputs.reshape(-1, width).float(), grad.reshape(-1, width).float(), scale.view(-1, 1)
        both = grad * rows  # [rows, D]
        d_inputs = d_weight = None
        if for_weight:
            d_weight = (scale.t() @ both).view(-1).to(weight.dtype)
        if for_inputs:
            wide = weight.float()
            lean = (both @ wide)[:, None] * scale.pow(3) / width
            d_inputs = torch.mul(grad, wide, out=both).mul_(scale).addcmul_(rows, lean, value=-1)
            d_inputs = d_inputs.view_as(inputs).to(inputs.dtype)
        return d_inputs, d_weight, None


def swiglu(gate, up) -> torch.Tensor:
    """Return silu(gate) * up, both [..., I]."""
    liger = liger_for(gate.device)
    if liger is not None:
        return liger.gate(gate, up)
    return _SwiGlu.apply(gate, up) if gate.dtype == up.dtype else F.silu(gate) * up


class _SwiGlu(torch.autograd.Function):
    """Keeps gate and up; torch's own composition keeps silu(gate) too."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        for_gate, for_up = ctx.needs_input_grad
        d_gate = d_up = None
        if for_gate:
            d_gate = grad * up
            torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        if for_up:
            d_up = F.silu(gate).mul_(grad)
        return d_gate, d_up


def rotate(query, key, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
    """Return query and key [B, L, H, Dh] turned by their positions; what is beyond the first R of Dh stays.

    cos, sin: [B or 1, L, R], both halves of R alike. The results are of the dtype that came, also where cos is wider.
    """
    liger = liger_for(query.device)
    if liger is not None and cos.shape[-1] == query.shape[-1]:
        # Its kernel writes into what it is given: here a projection's output, which no backward pass reads.
        turned = liger.rotate(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
        return turned[0].transpose(1, 2), turned[1].transpose(1, 2)
    return rotate_one(query, cos, sin), rotate_one(key, cos, sin)


def rotate_one(states, cos, sin) -> torch.Tensor:
    """Return queries or keys alone [B, L, H, Dh], turned."""
    if torch.compiler.is_compiling():
        # A compiler that traces the function below does not follow its writing into parts.
        turning, half = cos.shape[-1], cos.shape[-1] // 2
        part = states[..., :turning]
        across = torch.cat((-part[..., half:], part[..., :half]), dim=-1)
        turned = (part * cos[:, :, None] + across * sin[:, :, None]).to(states.dtype)
        return torch.cat((turned, states[..., turning:]), dim=-1)
    return _Rotate.apply(states, cos, sin)


class _Rotate(torch.autograd.Function):
    """Three passes forward and three back; keeps cos and sin, which all layers share."""

    @staticmethod
    def forward(ctx, states, cos, sin):
        ctx.save_for_backward(cos, sin)
        batch, length, heads, width = states.shape
        # Head by head in memory, as products of a head's rows like it.
        out = states.new_empty(batch, heads, length, width).transpose(1, 2)
        return _turn(states, cos, sin, out, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        # Row by row in memory, as the projection's gradient wants it.
        return _turn(grad, cos, sin, grad.new_empty(grad.shape), -1), None, None


def _turn(states, cos, sin, out, sign):
    """Write states [B, L, H, Dh], turned by `sign` times their angles, into out."""
    turning = cos.shape[-1]
    half = turning // 2
    cos, sin = cos[:, :, None, :half], sin[:, :, None, :half]
    first, second = states[..., :half], states[..., half:turning]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:turning]).addcmul_(first, sin, value=sign)
    if turning < states.shape[-1]:
        out[..., turning:] = states[..., turning:]
    return out
