"""Turn a numpy array or torch tensor of pixels into an image.

H, W: sides in pixels; C: channels, 1 (gray), 3 (RGB) or 4 (RGBA).
"""

import numpy as np
import torch
from PIL import Image

CHANNELS = (1, 3, 4)


def array_to_image(pixels) -> Image.Image:
    """Return the RGB image of an array or tensor [H, W, C], [C, H, W] or [H, W].

    uint8 and whole numbers from 0 to 255 are used as they are; floats from 0 to 1 are multiplied by 255. Raises
    ValueError for anything else, which could be understood in more than one way.
    """
    if isinstance(pixels, torch.Tensor):
        pixels = pixels.detach().cpu()
        pixels = (pixels.float() if pixels.dtype == torch.bfloat16 else pixels).numpy()
    pixels = _to_uint8(_channels_last(np.asarray(pixels)))
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
    return image.convert("RGB")


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    """Return pixels as [H, W, C]."""
    shape = pixels.shape
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    elif pixels.ndim == 3 and (shape[0] in CHANNELS) and (shape[2] in CHANNELS):
        raise ValueError(
            f"an array of shape {shape} may be [H, W, C] or [C, H, W]. Give a PIL image (PIL.Image.fromarray)."
        )
    elif pixels.ndim == 3 and shape[0] in CHANNELS:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] not in CHANNELS or not pixels.size:
        raise ValueError(
            f"an array of shape {shape} is not an image; expected [H, W, C], [C, H, W] or [H, W] with 1, 3 or 4 "
            "channels, one image an array."
        )
    return pixels


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind not in "iuf":
        raise ValueError(f"an array of {pixels.dtype} is not an image; expected uint8, or floats from 0 to 1.")
    if not np.isfinite(pixels).all():
        raise ValueError("an array with NaN or infinity is not an image; expected uint8, or floats from 0 to 1.")
    least, most = pixels.min(), pixels.max()
    if pixels.dtype.kind == "f" and least >= 0 and most <= 1:
        return np.rint(pixels.astype(np.float64) * 255).astype(np.uint8)
    if least >= 0 and most <= 255 and (pixels == np.floor(pixels)).all():
        return pixels.astype(np.uint8)
    raise ValueError(
        f"an array of {pixels.dtype} from {least:g} to {most:g} has no known scale; give uint8, whole numbers from 0 "
        "to 255, or floats from 0 to 1. Pixels that are normalised already go to the model itself, as pixel_values."
    )
