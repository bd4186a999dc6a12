"""Assign the tokens of an MoE layer to experts, with their weights and the balance loss.

Top-1 after Switch Transformer (Fedus et al. 2021, arXiv 2101.03961), top-2 after GShard (Lepikhin et al. 2020,
arXiv 2006.16668), as DeepSpeed's gates compute them. Different by default: no capacity, so nothing is dropped, and no
noise, so the same input always takes the same route. Random token selection, DeepSpeed's noise on which top-1 tokens
are dropped, does not exist here.

Shapes: `S` tokens, `E` experts, `K` experts of a token, `D` model width. An assignment is a token with one expert.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init


@dataclass(frozen=True)
class Routes:
    """The assignments of the tokens of one layer."""

    experts: torch.Tensor  # [S, K] int64
    weights: torch.Tensor  # [S, K] float32; 0 for a dropped assignment
    balance_loss: torch.Tensor  # scalar, with gradient
    load: torch.Tensor  # [E] assignments to each expert, before dropping
    dropped: torch.Tensor  # scalar, number of assignments


class Router(nn.Module):
    """One logit for each expert, in float32 for any dtype of the model; empty until drawn or loaded."""

    def __init__(self, hidden_size, num_experts, dtype=None, device=None):
        super().__init__()
        # A parameter, no nn.Linear: LoRA and 4-bit loading change every nn.Linear, and a router must stay exact.
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=dtype, device=device))  # [E, D]

    def reset_parameters(self):
        """Draw the weights as nn.Linear does, U(-1/sqrt(D), 1/sqrt(D))."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        init.uniform_(self.weight, -bound, bound)

    def forward(self, tokens):  # [S, D]
        # In the bfloat16 of the Trainer's autocast, experts would tie.
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.float(), self.weight.float())  # [S, E]


def route(logits, top_k, capacity=None, sample_second=False):
    """Assign each token to `top_k` experts.

    logits: [S, E] float32. capacity: maximum tokens of an expert, None for no limit. sample_second: draw the second of
    two experts instead of taking the more probable one. The weight of a single expert is its probability; the weights
    of two and more are scaled to sum 1 over the kept assignments, so a token that lost all its experts gets zero.
    """
    probs = logits.softmax(dim=1)
    experts = choose_experts(logits, probs, top_k, sample_second)
    weights = probs.gather(1, experts)
    dropped = torch.zeros((), device=logits.device)
    if capacity is not None:
        kept = keep_within_capacity(probs, experts, capacity)
        weights = weights * kept
        dropped = (~kept).sum()
    if top_k > 1:
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)
    load = F.one_hot(experts, logits.shape[1]).sum(dim=(0, 1))
    return Routes(experts, weights, balance_loss(probs, experts), load, dropped)


def choose_experts(logits, probs, top_k, sample_second=False):
    """Return the experts [S, K] of each token, the most probable first."""
    if top_k > 2:
        return probs.topk(top_k, dim=1).indices
    first = probs.argmax(dim=1, keepdim=True)
    if top_k == 1:
        return first
    if sample_second:
        # The argmax of logits + Gumbel(0, 1) is a draw from their softmax.
        logits = logits - torch.empty_like(logits).exponential_().log()
    second = logits.scatter(1, first, float("-inf")).argmax(dim=1, keepdim=True)
    return torch.cat([first, second], dim=1)


def balance_loss(probs, experts):
    """Return E * sum over experts of (mean probability x fraction of the tokens): 1 if balanced, E if collapsed.

    For top-1 and top-2 the fraction counts the first assignment of a token; for more, all assignments, divided by K.
    Both count before dropping. Without tokens the loss is 0.
    """
    num_tokens, num_experts = probs.shape
    counted = experts if experts.shape[1] > 2 else experts[:, :1]
    mean_prob = probs.sum(dim=0) / max(num_tokens, 1)
    fraction = F.one_hot(counted, num_experts).sum(dim=(0, 1)) / max(num_tokens, 1)
    return num_experts * (mean_prob * fraction).sum() / counted.shape[1]


def expert_capacity(num_tokens, num_experts, top_k, factor, min_capacity):
    """Return the maximum tokens of an expert: `factor` times the balanced number, at least `min_capacity`."""
    # In float32, as DeepSpeed rounds it: 25 tokens, 2 experts, factor 1.2 give 16, and 15 in double precision.
    capacity = torch.tensor(factor * top_k) * (num_tokens / num_experts)
    return max(int(capacity.ceil()), min_capacity)


def keep_within_capacity(probs, experts, capacity):
    """Return the assignments [S, K] (bool) within the capacity of their expert.

    Top-2: in token order, every first assignment before any second one. Three and more: the tokens of highest
    probability. Top-1: those that torch.topk returns among equals, as DeepSpeed without random token selection.
    """
    num_tokens, num_experts = probs.shape
    if experts.shape[1] == 2:
        first, second = F.one_hot(experts, num_experts).unbind(dim=1)  # [S, E] each
        places = torch.stack([first.cumsum(0) - 1, second.cumsum(0) - 1 + first.sum(0)], dim=1)  # [S, 2, E]
        return places.gather(2, experts.unsqueeze(2)).squeeze(2) < capacity
    if experts.shape[1] == 1:
        rank = F.one_hot(experts[:, 0], num_experts)
    else:
        rank = torch.zeros_like(probs).scatter(1, experts, probs.gather(1, experts))
    # The capacity may exceed the number of tokens (min_capacity, a decode step of one token).
    best = rank.topk(min(capacity, num_tokens), dim=0, sorted=experts.shape[1] == 1).indices
    taken = torch.zeros_like(probs, dtype=torch.bool).scatter(0, best, True)
    return taken.gather(1, experts)
