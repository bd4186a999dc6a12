"""Learned queries that read an image through a small transformer: LLaMA-Adapter V2's connector.

Gao et al. 2023, arXiv 2304.15010. N images, P features of an image, C tower width, K queries, W inner width, D model
width.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

# Of the original: torch's own default, not 1e-6 as in most vision transformers.
NORM_EPS = 1e-5


class SelfAttention(nn.Module):
    """Full self-attention with one linear layer for queries, keys and values."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden):  # [N, S, W] -> [N, S, W]
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)  # [N, H, S, W / H]
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, hidden):  # [N, S, W] -> [N, S, W]
        return self.fc2(F.gelu(self.fc1(hidden)))


class Block(nn.Module):
    """A pre-norm layer of a vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = SelfAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, hidden):  # [N, S, W] -> [N, S, W]
        hidden = hidden + self.attn(self.norm1(hidden))
        return hidden + self.mlp(self.norm2(hidden))


class QueryVit(nn.Module):
    """Features [N, P, C] to K vectors of an image [N, K, D]; queries come first and have no positions."""

    def __init__(self, in_width: int, out_width: int, num_queries=10, width=768, depth=8, num_heads=16, mlp_ratio=4.0):
        super().__init__()
        if width % num_heads:
            raise ValueError(
                f"mm_query_hidden {width} cannot be divided into mm_query_heads {num_heads}; choose a multiple."
            )
        self.query = nn.Parameter(torch.empty(num_queries, width))
        self.input_proj = nn.Linear(in_width, width)
        self.input_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio) for _ in range(depth))
        self.output_proj = nn.Linear(width, out_width)
        self.output_norm = nn.LayerNorm(out_width, eps=NORM_EPS)
        self.draw()

    @torch.no_grad()
    def draw(self) -> None:
        """Draw the queries from a normal distribution, as the original does."""
        init.normal_(self.query)

    def parts(self, num_features: int) -> list[tuple[nn.Module, int]]:
        """Return the parts, each with the number of tokens of an image that pass it."""
        num_queries = self.query.shape[0]
        return [
            *((part, num_features) for part in (self.input_proj, self.input_norm)),
            (self.blocks, num_queries + num_features),
            *((part, num_queries) for part in (self.output_proj, self.output_norm)),
        ]

    def forward(self, features):  # [N, P, C] -> [N, K, D]
        features = self.input_norm(self.input_proj(features))
        queries = self.query.to(features.dtype).expand(len(features), -1, -1)
        hidden = torch.cat([queries, features], dim=1)
        for block in self.blocks:
            hidden = block(hidden)
        return self.output_norm(self.output_proj(hidden[:, : self.query.shape[0]]))


def build_query_vit(config) -> nn.Module:
    """Return the connector of a config's mm_query_* keys."""
    return QueryVit(
        config.mm_hidden_size,
        config.hidden_size,
        config.mm_query_len,
        config.mm_query_hidden,
        config.mm_query_depth,
        config.mm_query_heads,
        config.mm_query_mlp_ratio,
    )
