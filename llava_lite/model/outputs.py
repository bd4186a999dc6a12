"""What a forward call returns."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class LlavaOutput(CausalLMOutputWithPast):
    """transformers' output with the parts of the loss.

    loss: lm_loss + moe_loss. lm_loss: cross-entropy over supervised positions. moe_loss: balance loss times its
    weight, summed over MoE layers, as MoE-LLaVA returns it. moe_loss_list: the unweighted terms, one a layer.
    logits: None in training with labels, where the head runs at supervised positions only.
    """

    lm_loss: torch.FloatTensor | None = None
    moe_loss: torch.FloatTensor | None = None
    moe_loss_list: tuple[torch.FloatTensor, ...] | None = None
