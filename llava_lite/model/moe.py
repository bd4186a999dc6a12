"""Stand in for a decoder layer's MLP with a router and a set of experts.

MoE-LLaVA: Mixture of Experts for Large Vision-Language Models (Lin et al. 2024, arXiv 2401.15947), section 3.
Different here: expert weights are fused in 3-D tensors and run by transformers' experts interface, padding takes no
expert, and nothing needs DeepSpeed.

Shapes: `B` batch, `L` tokens, `S` routed tokens (B * L without padding), `E` experts, `D` model width.
"""

import torch
from torch import nn

from .experts import Experts, MlpShape
from .moe_config import MoeConfig, moe_layer_indices, read_moe_config
from .router import Router, Routes, expert_capacity, route

__all__ = [
    "Experts",
    "MlpShape",
    "MoeBlock",
    "MoeConfig",
    "RoutingContext",
    "init_moe_weights",
    "moe_layer_indices",
    "read_moe_config",
    "set_routing",
]


class RoutingContext:
    """What the MoE layers of one forward pass share: which positions are padding, and what each layer did.

    It stays in place until the next forward pass: a gradient-checkpoint recompute reads it again, and what it records
    then is ignored, so nothing counts twice. One forward pass at a time between two backward passes.
    """

    def __init__(self, attention_mask=None, training=False):
        """attention_mask: [B, L or more] with 0 for padding, None for no padding; of a longer one the last L count."""
        self.attention_mask = attention_mask
        self.training = training
        self._positions = {}
        self._losses = {}
        self._counts = {}

    def __deepcopy__(self, memo):
        # Losses are part of a graph, which no copy of a model can take along.
        return RoutingContext(self.attention_mask, self.training)

    def real_positions(self, batch_size, length):
        """Return the flat positions [S] that are no padding, None if all are real; looked up once a forward pass."""
        if self.attention_mask is None:
            return None
        shape = (batch_size, length)
        if shape not in self._positions:
            mask = self.attention_mask[:, -length:]
            if mask.shape != shape:
                raise ValueError(
                    f"the attention mask has shape {tuple(self.attention_mask.shape)}, "
                    f"the hidden states have {batch_size} rows of {length}; give one mask column a token."
                )
            self._positions[shape] = None if mask.all() else mask.flatten().nonzero().squeeze(1)
        return self._positions[shape]

    def record(self, layer_idx, routes: Routes):
        """Keep the balance loss and the counts of a layer, the first time it runs."""
        if layer_idx not in self._losses:
            self._losses[layer_idx] = routes.balance_loss
            self._counts[layer_idx] = (routes.load.detach(), routes.dropped.detach(), routes.experts.shape[0])

    def balance_losses(self):
        """Return the balance losses, scalars with gradient, in layer order."""
        return [self._losses[layer_idx] for layer_idx in sorted(self._losses)]

    def counts(self):
        """Return for each layer (load [E], dropped choices, tokens), still on the device, for a caller who adds up."""
        return {layer_idx: self._counts[layer_idx] for layer_idx in sorted(self._counts)}

    def stats(self):
        """Return for each layer the expert load and what was lost, read from the device now.

        load: [E] shares of all choices before dropping, sum 1. dead: number of experts that no token chose. dropped:
        share of the choices. tokens: how many were routed.
        """
        return {layer_idx: _layer_stats(*counts) for layer_idx, counts in self.counts().items()}


def _layer_stats(load, dropped, num_tokens):
    num_choices = max(int(load.sum()), 1)
    return {
        "load": load.float().cpu() / num_choices,  # [E]
        "dead": int((load == 0).sum()),
        "dropped": float(dropped) / num_choices,
        "tokens": num_tokens,
    }


def set_routing(blocks, context):
    """Give the MoE layers (dict: layer index to MoeBlock) the context of the forward pass that begins."""
    for layer_idx, block in blocks.items():
        block.layer_idx = layer_idx
        block.routing = context


class MoeBlock(nn.Module):
    """A router named `gate` and `experts`, in place of `dense_mlp`; the module that ZeRO-3 takes as one leaf.

    The weights of both are empty until `init_moe_weights`, `upcycle` or a checkpoint fills them.

    config: the decoder's, which names the activation and the experts implementation at every call. dense_mlp: the MLP
    it replaces, read for kind, widths, dtype and device; with `use_residual` it stays, as `mlp`.
    """

    def __init__(self, config, moe: MoeConfig, num_experts, dense_mlp):
        super().__init__()
        shape = MlpShape.of(dense_mlp)
        like = next(dense_mlp.parameters())
        self.moe = moe
        self.num_experts = num_experts
        self.layer_idx = 0
        self.routing: RoutingContext | None = None
        self.gate = Router(shape.hidden_size, num_experts, dtype=like.dtype, device=like.device)
        self.experts = Experts(config, num_experts, shape, dtype=like.dtype, device=like.device)
        # The decorator fixes these for the class; here they are the dense MLP's.
        self.experts.has_gate, self.experts.has_bias = shape.gated, shape.biased
        if moe.use_residual:
            self.mlp = dense_mlp
            self.coefficient = nn.Linear(shape.hidden_size, 2, dtype=like.dtype, device=like.device)
        # A hook and not a line in forward: it must come before the backward hooks that wrap the input.
        self.register_forward_pre_hook(_ask_for_input_gradient)

    def forward(self, hidden):
        """Return the mix of the experts [B, L, D]; zero at padding, unless it counts as text (moe_count_padding)."""
        tokens = hidden.flatten(0, 1)  # [B * L, D]
        real = None
        # A graph cannot depend on how much is padding; where nothing is dropped or learned, padding changes no token.
        traced = torch.compiler.is_compiling() and not self.training and not self.moe.moe_drop_tokens
        if self.routing is not None and not self.moe.moe_count_padding and not traced:
            real = self.routing.real_positions(*hidden.shape[:2])
        if real is None:
            return self._mix(tokens).view_as(hidden)
        mixed = self._mix(tokens.index_select(0, real))  # [S, D]
        return torch.zeros_like(tokens).index_copy(0, real, mixed).view_as(hidden)

    def _mix(self, tokens):
        routes = self._route(tokens)
        if self.routing is not None:
            self.routing.record(self.layer_idx, routes)
        mixed = self.experts(tokens, routes.experts, routes.weights)
        if not self.moe.use_residual:
            return mixed
        share = self.coefficient(tokens).softmax(dim=-1)  # [S, 2]
        return (mixed * share[:, :1] + self.mlp(tokens) * share[:, 1:]).to(tokens.dtype)

    def _route(self, tokens):
        moe = self.moe
        training = self.training if self.routing is None else self.routing.training
        capacity = None
        if moe.moe_drop_tokens:
            factor = moe.capacity_factor if training else moe.eval_capacity_factor
            capacity = expert_capacity(len(tokens), self.num_experts, moe.top_k_experts, factor, moe.min_capacity)
        sampling = moe.moe_second_expert_sampling
        sample_second = sampling == "always" or (bool(sampling) and training)
        return route(self.gate(tokens), moe.top_k_experts, capacity, sample_second)


def _ask_for_input_gradient(block, args):
    """Let the input of a trained block require a gradient, even if everything before it is frozen.

    ZeRO-3 hangs the backward pass of a leaf module on the gradient of its input; without one the weights are gone when
    the backward pass needs them (RuntimeError: the size of tensor a (0) must match ...).
    """
    (hidden,) = args
    if torch.is_grad_enabled() and not hidden.requires_grad and block.gate.weight.requires_grad:
        return (hidden.detach().requires_grad_(),)
    return None


def init_moe_weights(module, std):
    """Draw the weights of a Router or of Experts; for a model's `_init_weights`, which knows no raw parameters."""
    if isinstance(module, Router):
        module.reset_parameters()
    elif isinstance(module, Experts):
        module.reset_parameters(std)
