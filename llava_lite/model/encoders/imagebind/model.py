"""Turn what ImageBind reads into embeddings [N, C]: one branch for each kind, one space for all.

Tokens, a transformer, a head and a scale each have the names of the released weights, which load strictly.
N samples, S clips of a sample, C width of an embedding.
"""

from __future__ import annotations

import math
from math import prod

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init

from llava_lite.imagebind_config import BRANCHES, ImageBindConfig
from llava_lite.model.encoders.imagebind.points import PointEncoder
from llava_lite.model.encoders.imagebind.tokens import (
    ImuTokens,
    PatchTokens,
    Positions,
    Stem,
    TextTokens,
    VideoStem,
    causal_mask,
)
from llava_lite.model.encoders.imagebind.transformer import NORM_EPS, Attention, Transformer

# By what a normalised embedding is multiplied; of text the scale is learned, and of images there is none.
SCALES = {"text": 1 / 0.07, "audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0, "point": 1.0}
MAX_SCALE = 100.0


class ImageBindModel(PreTrainedModel):
    """The encoder of every kind that the config's `modalities` name."""

    config_class = ImageBindConfig
    base_model_prefix = "imagebind"
    main_input_name = "pixel_values"
    _no_split_modules = ("Block", "PointBlock")
    _supports_sdpa = True

    def __init__(self, config: ImageBindConfig):
        super().__init__(config)
        branches = config.branches
        inner = [name for name in branches if name != "point"]
        self.modality_preprocessors = nn.ModuleDict({name: build_tokens(name, config) for name in inner})
        self.modality_trunks = nn.ModuleDict({name: build_trunk(name, config) for name in inner})
        self.modality_heads = nn.ModuleDict({name: build_head(name, config) for name in branches})
        self.modality_postprocessors = nn.ModuleDict({name: build_scale(name) for name in branches})
        self.point_trunk = PointEncoder(config) if "point" in branches else None
        self.post_init()

    @property
    def modalities(self) -> list[str]:
        """Return the kinds that `encode` knows."""
        return self.config.modalities

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [N, C] of images [N, 3, H, W], each of length 1."""
        return self.encode("image", pixel_values)

    def encode(self, kind: str, inputs: torch.Tensor) -> torch.Tensor:
        """Return embeddings [N, C], of length 1 times the scale of the kind (SCALES), as the original does.

        inputs: [N, *shape], or clips [N, S, *shape], whose embeddings are averaged; the shapes are those of
        `sample_shape`. The mean of clips is not normalised again. Raises ValueError for a kind that the encoder does
        not know, with the known ones, and for another shape.
        """
        if kind not in self.modalities:
            raise ValueError(
                f"this encoder does not read {kind!r}; it knows {', '.join(self.modalities)}. "
                "What an encoder reads are the modalities of its config."
            )
        shape = sample_shape(kind, self.config)
        num_clips = count_clips(kind, inputs, shape)
        samples = inputs if num_clips is None else inputs.flatten(0, 1)
        branch = BRANCHES[kind]
        # Ids stay whole numbers; neighbours of points are looked for in the precision of the file.
        samples = samples if kind in ("text", "point") else samples.to(self.dtype)
        embeddings = self.embed(branch, samples)
        return embeddings if num_clips is None else embeddings.unflatten(0, (-1, num_clips)).mean(dim=1)

    def embed(self, branch: str, samples: torch.Tensor) -> torch.Tensor:
        """Return the scaled embeddings [N, C] of samples without clips."""
        if branch == "point":
            feature = self.point_trunk(samples)
        else:
            if branch == "vision" and samples.ndim == 4:
                samples = samples[:, :, None].expand(-1, -1, self.config.num_frames, -1, -1)
            tokens = self.modality_trunks[branch](self.modality_preprocessors[branch](samples))
            # A text is read at its end token, which has the largest id of the vocabulary.
            place = samples.argmax(dim=-1) if branch == "text" else torch.zeros(len(tokens), dtype=torch.long)
            feature = tokens[torch.arange(len(tokens), device=tokens.device), place.to(tokens.device)]
        return self.modality_postprocessors[branch](self.modality_heads[branch](feature))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill a module's own weights as the original does."""
        super()._init_weights(module)
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, Attention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)
            if module.bias_k is not None:
                init.xavier_normal_(module.bias_k)
                init.xavier_normal_(module.bias_v)
        elif isinstance(module, LogScale):
            init.constant_(module.log_logit_scale, math.log(module.start))
        elif isinstance(module, TextTokens):
            init.copy_(module.mask, causal_mask(self.config.text_len))
        for name, param in module.named_parameters(recurse=False):
            if name in ("cls_token", "cls_pos", "pc_projection") or isinstance(module, Positions):
                init.normal_(param, std=param.shape[-1] ** -0.5)
            elif name == "pos_embed":
                init.normal_(param, std=0.01)


class Normalise(nn.Module):
    """Embeddings of length 1."""

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return [N, C]."""
        return F.normalize(embeddings, dim=-1)


class LogScale(nn.Module):
    """Multiply by a scale that is stored as its logarithm; learned, or a buffer."""

    def __init__(self, start: float, learned: bool):
        super().__init__()
        self.start = start
        scale = torch.tensor(math.log(start))
        if learned:
            self.log_logit_scale = nn.Parameter(scale)
        else:
            self.register_buffer("log_logit_scale", scale)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return [N, C]."""
        return self.log_logit_scale.exp().clamp(max=MAX_SCALE) * embeddings


class TextHead(nn.Module):
    """Norm and projection under the names of the released weights."""

    def __init__(self, width: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Sequential(nn.LayerNorm(width, eps=NORM_EPS), nn.Linear(width, hidden_size, bias=False))

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        """Return [N, C]."""
        return self.proj(feature)


def sample_shape(kind: str, config: ImageBindConfig) -> tuple[int | None, ...]:
    """Return the shape of one sample, or of one clip of it; None is any number."""
    side = config.image_size
    return {
        "image": (3, side, side),
        "video": (3, config.num_frames, side, side),
        "text": (None,),
        "audio": (1, config.audio_num_mel_bins, config.audio_num_frames),
        "depth": (1, side, side),
        "thermal": (1, side, side),
        "imu": (config.imu_num_channels, config.imu_len),
        "point": (None, 3),
    }[kind]


def count_clips(kind: str, inputs: torch.Tensor, shape: tuple[int | None, ...]) -> int | None:
    """Return the clips S of inputs [N, S, *shape], None for inputs [N, *shape]; ValueError for another shape."""
    num_leading = inputs.ndim - len(shape)
    given = inputs.shape[num_leading:] if num_leading > 0 else ()
    fits = len(given) == len(shape) and all(want in (None, have) for want, have in zip(shape, given, strict=True))
    if num_leading not in (1, 2) or not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{kind} of shape {tuple(inputs.shape)}; this encoder reads [N, {wanted}], or clips [N, S, {wanted}]. "
            "llava_lite.media.load makes tensors of this shape."
        )
    return inputs.shape[1] if num_leading == 2 else None


def build_tokens(branch: str, config: ImageBindConfig) -> nn.Module:
    """Return what turns the inputs of a branch into tokens."""
    c, side = config, config.image_size
    if branch == "vision":
        stem = VideoStem(c.vision_width, c.patch_size, c.num_frames)
        return PatchTokens(stem, "rgbt_stem", (side // c.patch_size) ** 2, c.vision_width)
    if branch == "text":
        return TextTokens(c.vocab_size, c.text_width, c.text_len)
    if branch == "imu":
        return ImuTokens(c.imu_num_channels, c.imu_width, c.imu_patch_size, c.imu_len)
    patch, stride, sides, width, name = {
        "audio": (
            c.audio_patch_size,
            c.audio_stride,
            (c.audio_num_mel_bins, c.audio_num_frames),
            c.audio_width,
            "rgbt_stem",
        ),
        "depth": (c.depth_patch_size, c.depth_patch_size, (side, side), c.depth_width, "depth_stem"),
        "thermal": (c.thermal_patch_size, c.thermal_patch_size, (side, side), c.thermal_width, "rgbt_stem"),
    }[branch]
    num_patches = prod((length - patch) // stride + 1 for length in sides)
    return PatchTokens(Stem(1, width, patch, stride), name, num_patches, width)


def build_trunk(branch: str, config: ImageBindConfig) -> Transformer:
    """Return the transformer of a branch."""
    c = config
    width, depth, heads, options = {
        "vision": (c.vision_width, c.num_hidden_layers, c.vision_num_heads, {"pre_norm": True}),
        "text": (c.text_width, c.text_num_layers, c.text_num_heads, {"causal": True}),
        "audio": (
            c.audio_width,
            c.audio_num_layers,
            c.audio_num_heads,
            {"bias_kv": True, "drop_path": c.audio_drop_path},
        ),
        "depth": (c.depth_width, c.depth_num_layers, c.depth_num_heads, {"bias_kv": True}),
        "thermal": (c.thermal_width, c.thermal_num_layers, c.thermal_num_heads, {"bias_kv": True}),
        "imu": (c.imu_width, c.imu_num_layers, c.imu_num_heads, {"bias_kv": True, "drop_path": c.imu_drop_path}),
    }[branch]
    return Transformer(width, depth, heads, c.mlp_ratio, **options)


def build_head(branch: str, config: ImageBindConfig) -> nn.Module:
    """Return norm and projection of a branch; the numbers of a sequence are those of the released weights."""
    c = config
    if branch == "text":
        return TextHead(c.text_width, c.hidden_size)
    width = c.point_projection_width if branch == "point" else getattr(c, f"{branch}_width")
    norm, project = nn.LayerNorm(width, eps=NORM_EPS), nn.Linear(width, c.hidden_size, bias=False)
    if branch == "point":
        return nn.Sequential(norm, nn.Dropout(c.head_dropout), project)
    if branch == "imu":
        return nn.Sequential(norm, nn.Identity(), nn.Dropout(c.head_dropout), project)
    return nn.Sequential(norm, nn.Identity(), project)


def build_scale(branch: str) -> nn.Module:
    """Return what normalises and scales the embeddings of a branch."""
    if branch == "vision":
        return Normalise()
    return nn.Sequential(Normalise(), LogScale(SCALES[branch], learned=branch == "text"))
