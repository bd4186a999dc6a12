"""The pre-norm transformer of every branch but points: [N, T, C] to [N, T, C].

N samples or clips, T tokens, C width of the branch.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

NORM_EPS = 1e-6


class Attention(nn.Module):
    """Self-attention with the weight names of torch's MultiheadAttention.

    bias_kv: one learned key and value beside those of the tokens, which every token may attend to.
    """

    def __init__(self, width: int, num_heads: int, bias_kv: bool, causal: bool):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.bias_k = nn.Parameter(torch.empty(1, 1, width)) if bias_kv else None
        self.bias_v = nn.Parameter(torch.empty(1, 1, width)) if bias_kv else None
        self.out_proj = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the attention's output, [N, T, C]."""
        query, key, value = F.linear(tokens, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if self.bias_k is not None:
            key = torch.cat([key, self.bias_k.expand(len(tokens), 1, -1)], dim=1)  # [N, T + 1, C]
            value = torch.cat([value, self.bias_v.expand(len(tokens), 1, -1)], dim=1)
        query, key, value = (rearrange(x, "n t (h c) -> n h t c", h=self.num_heads) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out_proj(rearrange(mixed, "n h t c -> n t (h c)"))


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [N, T, C]."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class DropPath(nn.Module):
    """In training, leave the residual branch of a sample out with probability `p` (Huang et al., arXiv 1603.09382)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """Return the branch of each sample, or zeros; what is kept is scaled by 1 / (1 - p)."""
        if not self.training or self.p == 0:
            return branch
        kept = branch.new_empty(len(branch), *[1] * (branch.ndim - 1)).bernoulli_(1 - self.p)
        return branch * kept / (1 - self.p)


class Block(nn.Module):
    """Attention and an MLP, each on normed tokens and added to them."""

    def __init__(self, width, num_heads, mlp_ratio, bias_kv, causal, drop_path):
        super().__init__()
        self.attn = Attention(width, num_heads, bias_kv, causal)
        self.norm_1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, mlp_ratio * width)
        self.norm_2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [N, T, C]."""
        tokens = tokens + self.drop_path(self.attn(self.norm_1(tokens)))
        return tokens + self.drop_path(self.mlp(self.norm_2(tokens)))


class Transformer(nn.Module):
    """A stack of blocks, with a norm in front where `pre_norm`; drop path grows from 0 to `drop_path` with depth."""

    def __init__(
        self, width, num_layers, num_heads, mlp_ratio, *, pre_norm=False, bias_kv=False, causal=False, drop_path=0.0
    ):
        super().__init__()
        # A sequence of one, since the released weights call it pre_transformer_layer.0.
        self.pre_transformer_layer = nn.Sequential(nn.LayerNorm(width, eps=NORM_EPS) if pre_norm else nn.Identity())
        rates = torch.linspace(0, drop_path, num_layers, device="cpu").tolist()
        self.blocks = nn.Sequential(*(Block(width, num_heads, mlp_ratio, bias_kv, causal, rate) for rate in rates))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [N, T, C]."""
        return self.blocks(self.pre_transformer_layer(tokens))
