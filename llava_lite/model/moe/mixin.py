"""What a model class adds for layers with experts: their initialisation, their routing context, their balance loss."""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from llava_lite.model.moe.block import (
    MoeBlock,
    RoutingContext,
    checkpoint_with_routing,
    init_moe_weights,
    read_moe_config,
)
from llava_lite.model.moe.experts import OWN


class ExpertsMixin:
    """For the decoder stack and the full model alike; their config says in `moe` which layers have experts."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Return True; transformers looks for its decorator in the model's own file, and ours is in experts.py."""
        return True

    def get_correct_experts_implementation(self, requested_experts):
        """Return the name of the function that runs the experts: our own unless another is requested."""
        return super().get_correct_experts_implementation(requested_experts or OWN)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # transformers' own initialisation does not know 3-D expert weights and the router's parameter.
        init_moe_weights(module, self.config.initializer_range)


class RoutingMixin:
    """For the full model, which starts the routing context of a call and adds the balance loss."""

    def moe_layers(self) -> dict[int, MoeBlock]:
        """Return the MoE blocks by layer index; empty in a dense model."""
        return {i: layer.mlp for i, layer in enumerate(self.model.layers) if isinstance(layer.mlp, MoeBlock)}

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        """Do what transformers does, with our routing; raise ValueError where the balance loss would get no gradient.

        transformers has no public hook for the checkpoint function of a model.
        """
        keywords = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and keywords.get("use_reentrant") and self.moe_layers():
            raise ValueError(
                "this model has experts, whose balance loss gets no gradient from reentrant checkpointing; "
                'give gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        # In a dense model too: experts may be added later.
        gradient_checkpointing_func = partial(checkpoint_with_routing, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def prepare_routing(self, routing, attention_mask, has_labels: bool) -> RoutingContext | None:
        """Return the context that this call's MoE layers share: `routing` if one is given; None in a dense model.

        attention_mask: [B, L or more]; a mask of another shape does not say which positions are padding.
        """
        if not self.moe_layers():
            return None
        if routing is None:
            if torch.compiler.is_compiling() and not self.training and not has_labels:
                # Nothing reads it; see MoeBlock.forward.
                return None
            routing = RoutingContext()
        is_padding_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2
        routing.start(attention_mask if is_padding_mask else None, self.training)
        return routing

    def add_balance_loss(self, lm_loss, routing):
        """Return (loss, moe_loss, per-layer terms); MoE-LLaVA adds the weighted sum over layers to the loss."""
        if routing is None or lm_loss is None:
            return lm_loss, None, None
        terms = tuple(routing.balance_losses())
        moe = read_moe_config(self.config.moe, self.config.num_hidden_layers)
        moe_loss = moe.router_aux_loss_coef * torch.stack([term.to(lm_loss.device) for term in terms]).sum()
        return lm_loss + moe_loss, moe_loss, terms
