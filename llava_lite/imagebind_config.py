"""The sizes of ImageBind; the defaults are those of imagebind_huge and of imagebind_w3D.pth."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

# What the encoder reads -> name of its branch in the released weights; images and videos share one.
BRANCHES = {
    "image": "vision",
    "video": "vision",
    "text": "text",
    "audio": "audio",
    "depth": "depth",
    "thermal": "thermal",
    "imu": "imu",
    "point": "point",
}


class ImageBindConfig(PreTrainedConfig):
    """Sizes of the encoder; `hidden_size` is the width of an embedding, as it is of a tower's feature.

    Raises ValueError with the known ones for a modality that no branch reads.
    """

    model_type = "imagebind"

    # What the encoder reads; a branch that nothing here needs is not built. image and video share one branch.
    modalities: list | tuple = tuple(BRANCHES)
    # Width of an embedding.
    hidden_size: int = 1024
    # Width of each MLP by the width of its transformer.
    mlp_ratio: int = 4

    # Side of an image, depth map or thermal image in pixels; patches of images and videos; frames of a clip.
    image_size: int = 224
    patch_size: int = 14
    num_frames: int = 2
    vision_width: int = 1280
    num_hidden_layers: int = 32
    vision_num_heads: int = 16

    vocab_size: int = 49408
    text_len: int = 77
    text_width: int = 1024
    text_num_layers: int = 24
    text_num_heads: int = 16

    # A clip of sound is a spectrogram of this many mel bins and frames of 10 ms.
    audio_num_mel_bins: int = 128
    audio_num_frames: int = 204
    audio_patch_size: int = 16
    audio_stride: int = 10
    audio_width: int = 768
    audio_num_layers: int = 12
    audio_num_heads: int = 12
    audio_drop_path: float = 0.1

    depth_patch_size: int = 16
    depth_width: int = 384
    depth_num_layers: int = 12
    depth_num_heads: int = 8

    thermal_patch_size: int = 16
    thermal_width: int = 768
    thermal_num_layers: int = 12
    thermal_num_heads: int = 12

    # Accelerometer and gyroscope, three axes each, at 200 Hz.
    imu_num_channels: int = 6
    imu_len: int = 2000
    imu_patch_size: int = 8
    imu_width: int = 512
    imu_num_layers: int = 6
    imu_num_heads: int = 8
    imu_drop_path: float = 0.7

    # Groups of a cloud and points of a group; the mini-PointNet is conv_width, 2 and 4 times that, encoder_width wide.
    point_num_groups: int = 512
    point_group_size: int = 32
    point_conv_width: int = 128
    point_encoder_width: int = 256
    point_position_width: int = 128
    point_width: int = 384
    point_num_layers: int = 12
    point_num_heads: int = 6
    point_drop_path: float = 0.1
    point_projection_width: int = 512

    # Of the heads of imu and point; training alone.
    head_dropout: float = 0.5

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.modalities = list(self.modalities)
        unknown = [kind for kind in self.modalities if kind not in BRANCHES]
        if unknown or not self.modalities:
            raise ValueError(f"modalities are of {', '.join(BRANCHES)}; got {self.modalities}.")

    @property
    def branches(self) -> list[str]:
        """Return the names of the branches that the modalities need, in the order of the released weights."""
        wanted = {BRANCHES[kind] for kind in self.modalities}
        return [name for name in dict.fromkeys(BRANCHES.values()) if name in wanted]

    @property
    def media(self) -> tuple[tuple[str, tuple[tuple[str, int], ...]], ...]:
        """The kinds of files that stand for an image, each with its `media_options`, for an ImageLayout."""
        return tuple((kind, tuple(self.media_options(kind).items())) for kind in self.modalities if kind != "text")

    def media_options(self, kind: str) -> dict[str, Any]:
        """Return the keywords with which llava_lite.media loads what this encoder reads."""
        side = {"side": self.image_size}
        return {
            "image": side,
            "video": side | {"num_frames": self.num_frames},
            "depth": side,
            "thermal": side,
            "audio": {"num_mel_bins": self.audio_num_mel_bins, "num_frames": self.audio_num_frames},
            "imu": {"num_channels": self.imu_num_channels, "num_samples": self.imu_len},
            "text": {"text_len": self.text_len},
            "point": {"min_points": self.point_group_size},
        }[kind]


# transformers has no ImageBind, so that its Auto class is told of ours.
AutoConfig.register(ImageBindConfig.model_type, ImageBindConfig, exist_ok=True)
