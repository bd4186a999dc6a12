"""Point-BERT (Yu et al. 2022, arXiv 2111.14819) as Point-Bind uses it: a cloud [N, P, 3] to a feature [N, C].

N clouds, P points of a cloud, G groups, K points of a group, C width.
Farthest point sampling starts at point 0; the original starts at a random one, and its features differ every time.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from llava_lite.model.encoders.imagebind.transformer import MLP, DropPath


class PointEncoder(nn.Module):
    """A cloud to its projected feature, with the names of the released weights (`point_trunk`)."""

    def __init__(self, config):
        super().__init__()
        self.point_encoder = PointTransformer(config)
        self.pc_projection = nn.Parameter(torch.empty(2 * config.point_width, config.point_projection_width))

    def forward(self, cloud: torch.Tensor) -> torch.Tensor:
        """Return [N, point_projection_width]."""
        return self.point_encoder(cloud) @ self.pc_projection


class PointTransformer(nn.Module):
    """Groups of points as tokens of a transformer; the CLS token and the maximum over groups, [N, 2 C]."""

    def __init__(self, config):
        super().__init__()
        width, depth = config.point_width, config.point_num_layers
        self.num_groups, self.group_size = config.point_num_groups, config.point_group_size
        self.encoder = MiniPointNet(config.point_conv_width, config.point_encoder_width)
        self.reduce_dim = nn.Linear(config.point_encoder_width, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.cls_pos = nn.Parameter(torch.empty(1, 1, width))
        hidden = config.point_position_width
        self.pos_embed = nn.Sequential(nn.Linear(3, hidden), nn.GELU(), nn.Linear(hidden, width))
        rates = torch.linspace(0, config.point_drop_path, depth, device="cpu").tolist()
        self.blocks = PointBlocks(width, config.point_num_heads, config.mlp_ratio, rates)
        self.norm = nn.LayerNorm(width)

    def forward(self, cloud: torch.Tensor) -> torch.Tensor:
        """Return [N, 2 C]; ValueError if the cloud has fewer points than a group."""
        if cloud.shape[1] < self.group_size:
            raise ValueError(
                f"a point cloud of {cloud.shape[1]} points; the encoder groups {self.group_size} neighbours, so give "
                "at least as many (it was trained with 8192)."
            )
        # Neighbours are found in the cloud's own precision: bfloat16 would take far points for near ones.
        groups, centres = divide(cloud, self.num_groups, self.group_size)
        dtype = self.norm.weight.dtype
        tokens = self.reduce_dim(self.encoder(groups.to(dtype)))  # [N, G, C]
        tokens = torch.cat([self.cls_token.expand(len(tokens), 1, -1), tokens], dim=1)
        positions = torch.cat([self.cls_pos.expand(len(tokens), 1, -1), self.pos_embed(centres.to(dtype))], dim=1)
        tokens = self.norm(self.blocks(tokens, positions))
        return torch.cat([tokens[:, 0], tokens[:, 1:].amax(dim=1)], dim=-1)


class PointBlocks(nn.Module):
    """Blocks, each of which adds the positions again."""

    def __init__(self, width, num_heads, mlp_ratio, drop_paths):
        super().__init__()
        self.blocks = nn.ModuleList(PointBlock(width, num_heads, mlp_ratio, rate) for rate in drop_paths)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return [N, 1 + G, C]."""
        for block in self.blocks:
            tokens = block(tokens + positions)
        return tokens


class PointBlock(nn.Module):
    """Attention and an MLP, each on normed tokens and added to them; norms with torch's own epsilon, 1e-5."""

    def __init__(self, width, num_heads, mlp_ratio, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = PointAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_ratio * width)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [N, T, C]."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class PointAttention(nn.Module):
    """Self-attention whose query, key and value have no bias."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [N, T, C]."""
        query, key, value = rearrange(self.qkv(tokens), "n t (three h c) -> three n h t c", three=3, h=self.num_heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(query, key, value), "n h t c -> n t (h c)"))


class MiniPointNet(nn.Module):
    """Points of each group, relative to its centre [N, G, K, 3], to one feature a group [N, G, C]."""

    def __init__(self, conv_width, encoder_width):
        super().__init__()
        first, last = 2 * conv_width, 4 * conv_width
        self.first_conv = nn.Sequential(
            nn.Conv1d(3, conv_width, 1), nn.BatchNorm1d(conv_width), nn.ReLU(), nn.Conv1d(conv_width, first, 1)
        )
        self.second_conv = nn.Sequential(
            nn.Conv1d(2 * first, last, 1), nn.BatchNorm1d(last), nn.ReLU(), nn.Conv1d(last, encoder_width, 1)
        )

    def forward(self, groups: torch.Tensor) -> torch.Tensor:
        """Return [N, G, C]."""
        num_groups = groups.shape[1]
        features = self.first_conv(rearrange(groups, "n g k c -> (n g) c k"))  # [N G, 2 C0, K]
        largest = features.amax(dim=2, keepdim=True).expand_as(features)
        features = self.second_conv(torch.cat([largest, features], dim=1)).amax(dim=2)  # [N G, C]
        return rearrange(features, "(n g) c -> n g c", g=num_groups)


def divide(cloud: torch.Tensor, num_groups: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return groups of neighbours [N, G, K, 3], relative to their centres, and the centres [N, G, 3]."""
    rows = torch.arange(len(cloud), device=cloud.device)
    centres = cloud[rows[:, None], farthest_points(cloud, num_groups)]
    squares = centres.square().sum(-1)[:, :, None] + cloud.square().sum(-1)[:, None]
    distances = squares - 2 * centres @ cloud.transpose(1, 2)  # [N, G, P]
    nearest = distances.topk(group_size, largest=False, sorted=False).indices  # [N, G, K]
    return cloud[rows[:, None, None], nearest] - centres[:, :, None], centres


def farthest_points(cloud: torch.Tensor, count: int) -> torch.Tensor:
    """Return indices [N, count] of points, each the farthest from those before it; the first is point 0.

    A cloud of fewer points than `count` gives some of them more than once.
    """
    rows = torch.arange(len(cloud), device=cloud.device)
    last = torch.zeros_like(rows)
    distance = cloud.new_full(cloud.shape[:2], torch.inf)
    chosen = [last]
    for _ in range(count - 1):
        to_last = (cloud - cloud[rows, last][:, None]).square().sum(-1)  # [N, P]
        distance = torch.minimum(distance, to_last)
        last = distance.argmax(dim=1)
        chosen.append(last)
    return torch.stack(chosen, dim=1)
