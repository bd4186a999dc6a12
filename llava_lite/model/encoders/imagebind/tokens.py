"""Turn what each branch reads into tokens [N, T, C]: patches, a CLS token in front, positions.

N samples or clips, T tokens, C width of the branch.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import nn


class Stem(nn.Module):
    """Patches of an image, [N, channels, H, W] to [N, P, C], by a convolution without bias, and normed."""

    def __init__(self, channels: int, width: int, patch_size: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride, bias=False)
        self.norm_layer = nn.LayerNorm(width)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return [N, P, C]."""
        return self.norm_layer(self.proj(image).flatten(2).transpose(1, 2))


class VideoStem(nn.Module):
    """Patches of all frames at once, [N, 3, frames, H, W] to [N, P, C], by a convolution without bias."""

    def __init__(self, width: int, patch_size: int, num_frames: int):
        super().__init__()
        size = (num_frames, patch_size, patch_size)
        # The second of two, since the released weights call it proj.1: the first repeats the frame of an image.
        self.proj = nn.Sequential(nn.Identity(), nn.Conv3d(3, width, size, size, bias=False))

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        """Return [N, P, C]."""
        return self.proj(clip).flatten(2).transpose(1, 2)


class LinearStem(nn.Module):
    """Pieces of a series, [N, channels, length] to [N, P, C], by a linear layer without bias, and normed."""

    def __init__(self, channels: int, width: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(channels * patch_size, width, bias=False)
        self.norm_layer = nn.LayerNorm(width)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        """Return [N, P, C]."""
        pieces = rearrange(series, "n c (t p) -> n t (c p)", p=self.patch_size)
        return self.norm_layer(self.proj(pieces))


class Positions(nn.Module):
    """A learned vector for every token."""

    def __init__(self, num_tokens: int, width: int):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the tokens with their positions added."""
        return tokens + self.pos_embed


class PatchTokens(nn.Module):
    """Patches with a CLS token in front and positions, for vision, audio, depth and thermal.

    stem_name: what the released weights call the stem of this branch.
    """

    def __init__(self, stem: nn.Module, stem_name: str, num_patches: int, width: int):
        super().__init__()
        self.stem_name = stem_name
        self.add_module(stem_name, stem)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embedding_helper = Positions(1 + num_patches, width)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return [N, 1 + P, C]."""
        patches = getattr(self, self.stem_name)(inputs)
        return self.pos_embedding_helper(torch.cat([self.cls_token.expand(len(patches), 1, -1), patches], dim=1))


class ImuTokens(nn.Module):
    """Pieces of a record of the sensors with a CLS token in front and positions."""

    def __init__(self, channels: int, width: int, patch_size: int, length: int):
        super().__init__()
        self.imu_stem = LinearStem(channels, width, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + length // patch_size, width))

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        """Return [N, 1 + P, C]."""
        pieces = self.imu_stem(series)
        return torch.cat([self.cls_token.expand(len(pieces), 1, -1), pieces], dim=1) + self.pos_embed


class TextTokens(nn.Module):
    """Embeddings of token ids [N, T] with positions."""

    def __init__(self, vocab_size: int, width: int, text_len: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.pos_embed = nn.Parameter(torch.empty(1, text_len, width))
        # In the released weights, and not read: attention is causal by itself.
        self.register_buffer("mask", causal_mask(text_len))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [N, T, C]."""
        return self.token_embedding(ids) + self.pos_embed[:, : ids.shape[1]]


def causal_mask(length: int) -> torch.Tensor:
    """Return what is added to attention scores [T, T]: -inf for a key after its query, else 0."""
    return torch.full((length, length), float("-inf")).triu(1)
