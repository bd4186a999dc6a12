"""Turn the tokens of an MoE layer into choices of experts, their weights and the balance loss.

Top-1 after Switch Transformer (Fedus et al. 2021, arXiv 2101.03961), top-2 after GShard (Lepikhin et al. 2020,
arXiv 2006.16668), as DeepSpeed's gates compute them. Different by default: no capacity, so nothing is dropped, and no
noise, so the same input always takes the same route. Random token selection, DeepSpeed's noise on which top-1 tokens
are dropped, does not exist here.

Shapes: `S` tokens, `E` experts, `K` choices a token, `D` model width.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init


@dataclass(frozen=True)
class Routes:
    """Where the tokens of one layer go."""

    experts: torch.Tensor  # [S, K] int64
    weights: torch.Tensor  # [S, K] float32; 0 for a dropped choice
    balance_loss: torch.Tensor  # scalar, with gradient
    load: torch.Tensor  # [E] choices of each expert, before dropping
    dropped: torch.Tensor  # scalar, number of choices


class Router(nn.Module):
    """One logit for each expert, in float32 whatever the model's dtype; empty until drawn or loaded."""

    def __init__(self, hidden_size, num_experts, dtype=None, device=None):
        super().__init__()
        # A parameter and no nn.Linear: LoRA and 4-bit loading take every nn.Linear, and a router must stay exact.
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=dtype, device=device))  # [E, D]

    def reset_parameters(self):
        """Draw the weights as nn.Linear does, U(-1/sqrt(D), 1/sqrt(D))."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        init.uniform_(self.weight, -bound, bound)

    def forward(self, tokens):  # [S, D]
        # The Trainer's autocast would make this bfloat16, in which experts tie.
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.float(), self.weight.float())  # [S, E]


def route(logits, top_k, capacity=None, sample_second=False):
    """Choose `top_k` experts for each token.

    logits: [S, E] float32. capacity: most tokens an expert takes, None for all. sample_second: draw the second of two
    experts instead of taking the likelier one. The weight of a single choice is its probability; two and more are
    scaled to sum 1 over those that were kept, so a token that lost all its experts gets zero.
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
    """Return the chosen experts [S, K], the likeliest first."""
    if top_k > 2:
        return probs.topk(top_k, dim=1).indices
    first = probs.argmax(dim=1, keepdim=True)
    if top_k == 1:
        return first
    if sample_second:
        # The largest of logits + Gumbel(0, 1) is a draw from their softmax.
        logits = logits - torch.empty_like(logits).exponential_().log()
    second = logits.scatter(1, first, float("-inf")).argmax(dim=1, keepdim=True)
    return torch.cat([first, second], dim=1)


def balance_loss(probs, experts):
    """Return E * sum over experts of (mean probability x share of the tokens): 1 if balanced, E if collapsed.

    For one and two choices the share is that of the first choice; for more, of all choices, divided by their number.
    Both count before dropping. No token at all costs 0.
    """
    num_tokens, num_experts = probs.shape
    counted = experts if experts.shape[1] > 2 else experts[:, :1]
    mean_prob = probs.sum(dim=0) / max(num_tokens, 1)
    share = F.one_hot(counted, num_experts).sum(dim=(0, 1)) / max(num_tokens, 1)
    return num_experts * (mean_prob * share).sum() / counted.shape[1]


def expert_capacity(num_tokens, num_experts, top_k, factor, min_capacity):
    """Return the most tokens an expert takes: `factor` times its balanced share, at least `min_capacity`."""
    # In float32, as DeepSpeed rounds it: 25 tokens, 2 experts, factor 1.2 give 16, and 15 in double precision.
    share = torch.tensor(factor * top_k) * (num_tokens / num_experts)
    return max(int(share.ceil()), min_capacity)


def keep_within_capacity(probs, experts, capacity):
    """Return which choices [S, K] (bool) their expert has room for.

    Two choices: in token order, every first choice before any second. Three and more: the tokens of highest
    probability. One: whichever torch.topk finds among equals, as DeepSpeed without random token selection.
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
    # The capacity may exceed the number of tokens (a floor on it, one-token decoding).
    best = rank.topk(min(capacity, num_tokens), dim=0, sorted=experts.shape[1] == 1).indices
    taken = torch.zeros_like(probs, dtype=torch.bool).scatter(0, best, True)
    return taken.gather(1, experts)
