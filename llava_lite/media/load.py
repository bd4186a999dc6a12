"""Load a file of any kind that ImageBind reads: its path or bytes to the tensor of one sample."""

from __future__ import annotations

import torch

from llava_lite.media.audio import load_audio
from llava_lite.media.depth import load_depth
from llava_lite.media.imu import load_imu
from llava_lite.media.pixels import load_image
from llava_lite.media.points import load_points
from llava_lite.media.text import load_text
from llava_lite.media.thermal import load_thermal
from llava_lite.media.video import load_video

# Kind -> function of a path or bytes (of text: the text itself), with options; shapes are those of imagebind_huge.
MEDIA = {
    "image": load_image,  # [3, 224, 224]
    "video": load_video,  # [15, 3, 2, 224, 224], five clips at three crops each
    "text": load_text,  # [77]
    "audio": load_audio,  # [3, 1, 128, 204], three clips
    "depth": load_depth,  # [1, 224, 224]
    "thermal": load_thermal,  # [1, 224, 224]
    "imu": load_imu,  # [6, 2000]
    "point": load_points,  # [N, 3]
}


def load_media(kind: str, source, **options) -> torch.Tensor:
    """Return one sample of a kind, without the batch dimension; ValueError for an unknown kind, with the known ones.

    options: those of the kind's function; ImageBindConfig.media_options gives the sizes that an encoder needs.
    """
    if kind not in MEDIA:
        raise ValueError(f"unknown kind of media {kind!r}; known: {', '.join(MEDIA)}.")
    return MEDIA[kind](source, **options)
