"""Turn the pixels that a tower is given back into images for a page."""

import base64
import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

# Smaller ones are kept exactly.
JPEG_FROM_PX = 128


class ShownImage(NamedTuple):
    """An image as the tower sees it. size: (width, height) of the file; num_tokens: places that it takes in the text.

    crops: data URLs, of any-resolution the overview first, then its tiles, `columns` in a row. note: what is no image.
    """

    size: tuple[int, int]
    num_tokens: int
    crops: list[str]
    pixels: tuple[int, int]  # width and height of a crop
    columns: int
    note: str


def show_image(pixels, size, dataset) -> ShownImage:
    """Return an image of a batch. pixels: [3, H, W], crops [n, 3, H, W], or {kind: (sample, weight)} of media."""
    layout, size = dataset.layout, (int(size[0]), int(size[1]))
    num_tokens = layout.num_tokens(size)
    if isinstance(pixels, dict):
        shapes = [f"{kind} {tuple(sample.shape)}, weight {weight:g}" for kind, (sample, weight) in pixels.items()]
        note = ", ".join(shapes)
        found = [sample for kind, (sample, _) in pixels.items() if kind == "image"]
        crops = found[0].reshape(-1, *found[0].shape[-3:]) if found else torch.empty(0, 3, 0, 0)
    else:
        note, crops = "", pixels.reshape(-1, *pixels.shape[-3:])
    columns = layout.grid(size)[0] if layout.is_anyres else 1
    shape = (int(crops.shape[-1]), int(crops.shape[-2]))
    return ShownImage(size, num_tokens, [to_url(crop, dataset) for crop in crops], shape, columns, note)


def to_url(crop: torch.Tensor, dataset) -> str:
    """Return a crop [3, H, W], bytes or normalised, as a data URL."""
    if crop.dtype != torch.uint8:
        processor = dataset.image_processor
        if getattr(processor, "do_normalize", False):
            mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
            crop = crop.float() * std[:, None, None] + mean[:, None, None]
        crop = (crop.float() * 255).round().clamp(0, 255).to(torch.uint8)
    if dataset.layout.channels == "bgr":
        crop = crop.flip(0)
    image = Image.fromarray(np.ascontiguousarray(crop.permute(1, 2, 0).numpy()))
    file = io.BytesIO()
    kind = "JPEG" if min(image.size) >= JPEG_FROM_PX else "PNG"
    image.save(file, kind, **({"quality": 85} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
