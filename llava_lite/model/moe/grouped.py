"""Turn tokens and their assigned experts into the weighted sum of the experts' outputs, with explicit gradients.

The assignments are sorted by expert once: the rows of an expert are adjacent in every product, none is padded, none is
dropped, and no tensor is larger than assignments times width. Saved for the backward pass are tokens, routes and the
inner rows before their activation, which is recomputed. MegaBlocks (Gale et al. 2022, arXiv 2211.15841) and ScatterMoE
(Tan et al. 2024, arXiv 2403.08245) do so with kernels of their own; here torch's products do.

Shapes: `S` tokens, `K` experts of a token, `R` rows of a group, `E` experts, `D` model width, `I` width of an expert.
"""

import torch
from torch.autograd.function import once_differentiable

from llava_lite.model.moe.activation import ExpertActivation
from llava_lite.model.moe.groups import can_group, empty_gradient, group_assignments
from llava_lite.model.torch_private import is_graph_kept

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def grouped_experts(module, tokens, experts, weights):
    """Return the weighted sum of the assigned experts' outputs [S, D]; a function of transformers' experts interface.

    module: Experts. tokens: [S, D]; experts, weights: [S, K].
    """
    params = _parameters(module)
    dtype = params[0].dtype
    if torch.is_autocast_enabled(tokens.device.type):
        dtype = torch.get_autocast_dtype(tokens.device.type)
        params = [param if param is None else param.to(dtype) for param in params]
    activation = ExpertActivation(module.has_gate, module.config.hidden_act, module.act_fn)
    widths = (module.shape.hidden_size, module.shape.intermediate_size)
    rows = tokens.to(dtype)
    groups = group_assignments(experts, module.num_experts, can_group(tokens.device, dtype, widths), module.matmul)
    if torch.is_grad_enabled():
        mixed = _GroupedExperts.apply(rows, weights, *params, activation, groups)
    else:
        mixed = mix_experts(rows, weights, params, activation, groups)
    return mixed.to(tokens.dtype)


def can_run(module, tokens):
    """Return whether the weights are plain tensors of one dtype; else transformers' functions must run them."""
    given = [param for param in _parameters(module) if param is not None]
    plain = all(type(param.data) is torch.Tensor and param.dtype in DTYPES for param in given)
    return plain and len({param.dtype for param in given}) == 1 and given[0].device == tokens.device


def _parameters(module):
    up_bias, down_bias = f"{module.up_name}_bias", "down_proj_bias"
    biases = (getattr(module, name) if module.has_bias else None for name in (up_bias, down_bias))
    up_bias, down_bias = biases
    return getattr(module, module.up_name), up_bias, module.down_proj, down_bias


def mix_experts(tokens, weights, params, activation, groups, keep=None):
    """Return the weighted sum of the experts' outputs [S, D]; `keep`, a list, gets the inner rows of each group."""
    up, up_bias, down, down_bias = params
    mixed = torch.zeros_like(tokens, dtype=weights.dtype)
    for group in groups:
        inner = group.product(tokens.index_select(0, group.tokens), up, up_bias)  # [R, 2I] or [R, I]
        group.add_to(mixed, group.product(activation.hidden(inner), down, down_bias), weights)
        if keep is not None:
            keep.append(inner)
    return mixed.to(tokens.dtype)


class _GroupedExperts(torch.autograd.Function):
    """Two products for each group of rows in the forward pass, four more in the backward pass."""

    @staticmethod
    def forward(ctx, tokens, weights, up, up_bias, down, down_bias, activation, groups):
        inners = []
        mixed = mix_experts(tokens, weights, (up, up_bias, down, down_bias), activation, groups, inners)
        # The parameters and not views of them: ZeRO-3 frees their storage and gathers it again.
        ctx.save_for_backward(tokens, weights, up, down, down_bias, *inners)
        ctx.activation, ctx.groups = activation, groups
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tokens, weights, up, down, down_bias, *inners = ctx.saved_tensors
        for_tokens, for_weights, for_up, for_up_bias, for_down, for_down_bias, *_ = ctx.needs_input_grad
        d_tokens = torch.zeros_like(tokens, dtype=weights.dtype) if for_tokens else None
        d_weights = torch.zeros_like(weights, memory_format=torch.contiguous_format) if for_weights else None
        d_up = empty_gradient(up, ctx.groups) if for_up else None
        d_up_bias = empty_gradient(up[:, :, 0], ctx.groups) if for_up_bias else None
        d_down = empty_gradient(down, ctx.groups) if for_down else None
        d_down_bias = empty_gradient(down_bias, ctx.groups) if for_down_bias else None
        keeps = is_graph_kept()
        for group, inner in zip(ctx.groups, inners, strict=True):
            row_weights = weights.flatten()[group.assignments, None]  # [R, 1]
            d_out = grad.index_select(0, group.tokens)  # [R, D], before the row weights
            d_hidden = group.product_back(d_out, down)  # [R, I]
            # Inner rows that no later backward pass reads are overwritten by their gradient.
            d_inner = torch.empty_like(inner) if keeps else inner
            hidden, dots = ctx.activation.back(inner, d_hidden, row_weights, weights.dtype, d_inner)
            if for_weights:
                d_weight = dots if down_bias is None else dots + group.dot_bias(d_out, down_bias)
                d_weights.view(-1)[group.assignments] = d_weight.to(d_weights.dtype)
            d_out.mul_(row_weights)
            if for_down:
                group.weight_gradient(d_out, hidden, d_down)
            if for_down_bias:
                group.bias_gradient(d_out, d_down_bias)
            del d_out, d_hidden, hidden
            if for_up:
                group.weight_gradient(d_inner, tokens.index_select(0, group.tokens), d_up)
            if for_up_bias:
                group.bias_gradient(d_inner, d_up_bias)
            if for_tokens:
                group.add_to(d_tokens, group.product_back(d_inner, up))
        d_tokens = None if d_tokens is None else d_tokens.to(tokens.dtype)
        return d_tokens, d_weights, d_up, d_up_bias, d_down, d_down_bias, None, None
