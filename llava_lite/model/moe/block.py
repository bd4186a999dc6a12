"""Replace a decoder layer's MLP by a router and a set of experts.

MoE-LLaVA: Mixture of Experts for Large Vision-Language Models (Lin et al. 2024, arXiv 2401.15947), section 3.
Different here: expert weights are fused in 3-D tensors and run by transformers' experts interface, padding is not
routed, and nothing needs DeepSpeed.

Shapes: `B` batch, `L` tokens, `S` routed tokens (B * L without padding), `E` experts, `D` model width.
"""

import threading
from contextlib import contextmanager

import torch
from torch import nn

from llava_lite.model.moe.config import MoeConfig, moe_layer_indices, read_moe_config
from llava_lite.model.moe.experts import Experts, MlpShape
from llava_lite.model.moe.router import Router, Routes, expert_capacity, route

__all__ = [
    "Experts",
    "MlpShape",
    "MoeBlock",
    "MoeConfig",
    "RoutingContext",
    "checkpoint_with_routing",
    "init_moe_weights",
    "moe_layer_indices",
    "read_moe_config",
    "use_routing",
]


class RoutingContext:
    """State that the MoE layers of one forward call share: which positions are padding, and what each layer recorded.

    It belongs to the call. Layers find it by `use_routing`; a layer that is recomputed for the backward pass finds it
    again (`checkpoint_with_routing`), and its second record is ignored, so nothing counts twice.
    """

    def __init__(self, attention_mask=None, training=False):
        self.start(attention_mask, training)

    def start(self, attention_mask, training):
        """Clear the state of an earlier call and begin one.

        attention_mask: [B, L or more] with 0 for padding, None for no padding; of a longer one the last L columns
        are read.
        """
        self.attention_mask = attention_mask
        self.training = training
        self._positions = {}
        self._losses = {}
        self._counts = {}

    def real_positions(self, batch_size, length):
        """Return the flat positions [S] without padding, None if there is no padding; computed once a forward pass."""
        if self.attention_mask is None:
            return None
        shape = (batch_size, length)
        if shape not in self._positions:
            mask = self.attention_mask[:, -length:]
            if mask.shape != shape:
                raise ValueError(
                    f"the attention mask has shape {tuple(self.attention_mask.shape)}, "
                    f"the hidden states have {batch_size} sequences of {length}; give one mask column a token."
                )
            self._positions[shape] = None if mask.all() else mask.flatten().nonzero().squeeze(1)
        return self._positions[shape]

    def record(self, layer_idx, routes: Routes):
        """Store the balance loss and the counts of a layer, the first time it runs."""
        if layer_idx not in self._losses:
            self._losses[layer_idx] = routes.balance_loss
            self._counts[layer_idx] = (routes.load.detach(), routes.dropped.detach(), routes.experts.shape[0])

    def balance_losses(self):
        """Return the balance losses, scalars with gradient, in layer order."""
        return [self._losses[layer_idx] for layer_idx in sorted(self._losses)]

    def counts(self):
        """Return for each layer (load [E], dropped assignments, routed tokens), on the device, for a caller's sums."""
        return {layer_idx: self._counts[layer_idx] for layer_idx in sorted(self._counts)}

    def stats(self):
        """Return the statistics of each layer; this waits for the device.

        load: [E] fractions of all assignments before dropping, sum 1. dead: number of experts without tokens. dropped:
        fraction of the assignments. tokens: number of routed tokens.
        """
        return {layer_idx: _layer_stats(*counts) for layer_idx, counts in self.counts().items()}


def _layer_stats(load, dropped, num_tokens):
    num_assignments = max(int(load.sum()), 1)
    return {
        "load": load.float().cpu() / num_assignments,  # [E]
        "dead": int((load == 0).sum()),
        "dropped": float(dropped) / num_assignments,
        "tokens": num_tokens,
    }


class _Current(threading.local):
    """The routing context of this thread's forward call; None outside of one."""

    def __init__(self):
        # In the constructor and not on the class: torch.compile guards on the instance's own attributes.
        self.routing: RoutingContext | None = None


# threading.local and not contextvars, which torch.compile does not trace.
_CURRENT = _Current()


@contextmanager
def use_routing(routing: RoutingContext | None):
    """Let the MoE layers that this thread runs in the block use `routing`."""
    before = _CURRENT.routing
    _CURRENT.routing = routing
    try:
        yield routing
    finally:
        _CURRENT.routing = before


def checkpoint_with_routing(checkpoint, function, *args, **kwargs):
    """Return checkpoint(function, ...) whose recomputation, in any thread, uses the routing of this call."""
    routing = _CURRENT.routing

    def run(*args, **kwargs):
        with use_routing(routing):
            return function(*args, **kwargs)

    return checkpoint(run, *args, **kwargs)


class MoeBlock(nn.Module):
    """A router named `gate` and `experts`, in place of `dense_mlp`; one leaf module for ZeRO-3.

    The weights of both are empty until `init_moe_weights`, `upcycle` or a checkpoint fills them.

    config: the decoder's; it names the activation and, at every call, the experts implementation. dense_mlp: the MLP
    to replace, read for kind, widths, dtype and device; with `use_residual` it stays, as `mlp`. layer_idx: index of
    the decoder layer, under which the routing context stores the record of this block.
    """

    def __init__(self, config, moe: MoeConfig, num_experts, dense_mlp, layer_idx=0):
        super().__init__()
        shape = MlpShape.of(dense_mlp)
        like = next(dense_mlp.parameters())
        self.moe = moe
        self.num_experts = num_experts
        self.layer_idx = layer_idx
        self.gate = Router(shape.hidden_size, num_experts, dtype=like.dtype, device=like.device)
        self.experts = Experts(config, num_experts, shape, dtype=like.dtype, device=like.device)
        if moe.use_residual:
            self.mlp = dense_mlp
            self.coefficient = nn.Linear(shape.hidden_size, 2, dtype=like.dtype, device=like.device)
        # A hook and not a line in forward: it must come before the backward hooks that wrap the input.
        self.register_forward_pre_hook(_ask_for_input_gradient)

    def forward(self, hidden):
        """Return the weighted sum of the experts [B, L, D]; zero at padding unless moe_count_padding routes it."""
        tokens = hidden.flatten(0, 1)  # [B * L, D]
        routing, real = _CURRENT.routing, None
        # A compiled graph cannot depend on the amount of padding; in inference without dropping it changes no token.
        traced = torch.compiler.is_compiling() and not self.training and not self.moe.moe_drop_tokens
        if routing is not None and not self.moe.moe_count_padding and not traced:
            real = routing.real_positions(*hidden.shape[:2])
        if real is None:
            return self._mix(tokens, routing).view_as(hidden)
        # A device map may spread layers over devices; the mask lies on one.
        real = real.to(tokens.device)
        mixed = self._mix(tokens.index_select(0, real), routing)  # [S, D]
        return torch.zeros_like(tokens).index_copy(0, real, mixed).view_as(hidden)

    def _mix(self, tokens, routing):
        routes = self._route(tokens, self.training if routing is None else routing.training)
        if routing is not None:
            routing.record(self.layer_idx, routes)
        mixed = self.experts(tokens, routes.experts, routes.weights)
        if not self.moe.use_residual:
            return mixed
        weights = self.coefficient(tokens).softmax(dim=-1)  # [S, 2]
        return (mixed * weights[:, :1] + self.mlp(tokens) * weights[:, 1:]).to(tokens.dtype)

    def _route(self, tokens, training):
        moe = self.moe
        capacity = None
        if moe.moe_drop_tokens:
            factor = moe.capacity_factor if training else moe.eval_capacity_factor
            capacity = expert_capacity(len(tokens), self.num_experts, moe.top_k_experts, factor, moe.min_capacity)
        sampling = moe.moe_second_expert_sampling
        sample_second = sampling == "always" or (bool(sampling) and training)
        return route(self.gate(tokens), moe.top_k_experts, capacity, sample_second)


def _ask_for_input_gradient(block, args):
    """Let the input of a trained block require a gradient, even if everything before it is frozen.

    ZeRO-3 starts the backward pass of a leaf module at the gradient of its input; without one the weights are not
    gathered when the backward pass needs them (RuntimeError: the size of tensor a (0) must match ...).
    """
    (hidden,) = args
    if torch.is_grad_enabled() and not hidden.requires_grad and block.gate.weight.requires_grad:
        return (hidden.detach().requires_grad_(),)
    return None


def init_moe_weights(module, std):
    """Draw the weights of a Router or of Experts; transformers' `_init_weights` does not know their parameters."""
    if isinstance(module, Router):
        module.reset_parameters()
    elif isinstance(module, Experts):
        module.reset_parameters(std)
