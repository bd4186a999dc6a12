"""Turn an image into the tensor that ImageBind reads, and normalise the frames of its videos alike."""

from __future__ import annotations

import torch
from PIL import Image

from llava_lite.media.image import upright_image
from llava_lite.media.preprocess import image_bytes
from llava_lite.media.transform import ImageTransform

# CLIP's, per channel.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def load_image(source, side=224) -> torch.Tensor:
    """Return an image, float32 [3, side, side]: short side resized (bicubic), centre cropped, CLIP's normalisation.

    source: whatever upright_image opens; ImageError as there. Where the long side leaves an odd number of pixels, the
    crop may lie a pixel off torchvision's, as that of every image here.
    """
    return square(upright_image(source), side, MEAN, STD)


def square(image: Image.Image, side: int, mean, std) -> torch.Tensor:
    """Return an image resized by its short side and centre cropped, normalised by channel, float32 [3, side, side]."""
    transform = ImageTransform(side, (side, side), Image.Resampling.BICUBIC, 255.0, mean, std)
    return transform.normalise(image_bytes(image, transform))


def normalise(frames: torch.Tensor) -> torch.Tensor:
    """Return frames [..., 3, F, H, W] from 0 to 1 with CLIP's normalisation."""
    mean, std = torch.tensor([MEAN, STD])[:, :, None, None, None]
    return (frames - mean) / std
