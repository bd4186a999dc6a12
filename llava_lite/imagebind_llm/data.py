"""ImageBind's loaders under their names: paths, or texts, to a batch for `generate`.

B paths. Shapes are those of imagebind_huge; None for no paths, as in the original.
"""

from __future__ import annotations

import torch

from llava_lite.media.load import load_media


def load_batch(kind: str, sources, device, **options) -> torch.Tensor | None:
    """Return the samples of one kind as a batch on a device, None without sources."""
    if sources is None:
        return None
    return torch.stack([load_media(kind, source, **options) for source in sources]).to(device)


def load_and_transform_vision_data(image_paths, device):  # [B, 3, 224, 224]
    """Return images."""
    return load_batch("image", image_paths, device)


def load_and_transform_text(text, device, **options):  # [B, 77]
    """Return the token ids of texts."""
    return load_batch("text", text, device, **options)


def load_and_transform_audio_data(audio_paths, device, **options):  # [B, 3, 1, 128, 204]
    """Return three clips of each sound."""
    return load_batch("audio", audio_paths, device, **options)


def load_and_transform_video_data(video_paths, device, **options):  # [B, 15, 3, 2, 224, 224]
    """Return five clips of each video at three crops."""
    return load_batch("video", video_paths, device, **options)


def load_and_transform_point_cloud_data(point_paths, device):  # [B, N, 3]
    """Return point clouds, which must have the same number of points."""
    return load_batch("point", point_paths, device)
