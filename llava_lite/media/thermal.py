"""Turn a thermal image into the tensor that ImageBind reads."""

from __future__ import annotations

import torch

from llava_lite.media.image import upright_image
from llava_lite.media.pixels import square


def load_thermal(source, side=224) -> torch.Tensor:
    """Return a thermal image, float32 [1, side, side] from 0 to 1: grey, resized and cropped as an image.

    ImageBind published no loader. Without a normalisation its published accuracy on LLVIP was nearly reached by users
    (facebookresearch/ImageBind, pull request 73), with one it was not.
    """
    return square(upright_image(source).convert("L"), side, mean=(0.0,) * 3, std=(1.0,) * 3)[:1]
