"""Turn a depth map into the disparities that ImageBind reads."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from llava_lite.media.files import MediaError, is_array_file, name_source, read_array, read_bytes

# The camera of NYU Depth v2, a Kinect, by which depths become disparities: metres between its lenses, and pixels.
BASELINE_M, FOCAL_PX = 0.075, 518.857901
# Omnivore's (Girdhar et al. 2022, arXiv 2201.08377), to which ImageBind's authors refer.
MAX_DISPARITY_PX, MEAN, STD = 75.0, 0.0418, 0.0295


def load_depth(source, side=224, baseline_m=BASELINE_M, focal_px=FOCAL_PX, unit_m=None) -> torch.Tensor:
    """Return a depth map as normalised disparities, float32 [1, side, side].

    source: path or bytes of an image of one channel (16 bits), .npy, or a tensor that torch saved, [H, W]. unit_m:
    metres of a unit; None for millimetres of whole numbers and metres of floats. baseline_m, focal_px: of the camera.
    Disparity is baseline * focal / depth, as ImageBind's authors advise (issues 14, 69 and 134), 0 where the depth is
    unknown (0 or NaN); divided by 75 and standardised as in Omnivore. ImageBind published no loader.
    Raises MediaError for a file that holds no such map.
    """
    depth = read_depth(source)
    unit_m = unit_m or (1.0 if depth.dtype.kind == "f" else 0.001)
    metres = torch.from_numpy(depth.astype(np.float32)) * unit_m
    known = metres > 0
    if not known.any():
        raise MediaError("depth", name_source(source), "it has no depth above 0.")
    disparity = torch.where(known, baseline_m * focal_px / metres, 0.0).clamp(max=MAX_DISPARITY_PX)
    cropped = resize_and_crop(disparity[None], side)
    return (cropped / MAX_DISPARITY_PX - MEAN) / STD


def read_depth(source) -> np.ndarray:
    """Return the depths [H, W] of a file, in its own unit."""
    data = read_bytes("depth", source)
    if is_array_file(data):
        depth = read_array("depth", source, data)
    else:
        try:
            with Image.open(io.BytesIO(data), formats=("PNG", "TIFF", "PPM")) as image:
                depth = np.asarray(image)
        # Pillow raises nearly every kind of error for a broken file.
        except Exception as error:
            reason = f"it is no PNG, TIFF, PGM, .npy or .pt file ({type(error).__name__}: {error})."
            raise MediaError("depth", name_source(source), reason) from error
    depth = depth.squeeze()
    if depth.ndim != 2 or depth.dtype.kind not in "iuf":
        reason = f"its shape is {depth.shape} of {depth.dtype}; a depth map has one number a pixel, [H, W]."
        raise MediaError("depth", name_source(source), reason)
    return depth


def resize_and_crop(maps: torch.Tensor, side: int) -> torch.Tensor:
    """Return maps [C, H, W] with the short side resized to `side` (bilinear) and the centre cropped to a square."""
    height, width = maps.shape[-2:]
    short = min(height, width)
    size = (max(side, height * side // short), max(side, width * side // short))
    resized = torch.nn.functional.interpolate(maps[None], size=size, mode="bilinear", antialias=True)[0]
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return resized[:, top : top + side, left : left + side]
