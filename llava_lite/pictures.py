"""Turn a picture file into the tensor that a vision tower reads."""

import base64
import io
import os

import numpy as np
import torch
from PIL import Image, ImageOps

from llava_lite.anyres import cut_crops, default_pinpoints
from llava_lite.bit_depth import UnfitPixels, is_deep, to_8_bits
from llava_lite.constants import ASPECT_RATIOS
from llava_lite.jpeg import read_jpeg
from llava_lite.picture_steps import OtherSteps, PictureSteps, read_steps
from llava_lite.resize import Resize, resized_bytes

# 256 MiB once decoded as RGB, where Pillow itself begins to warn. Phones and cameras end at 65 million pixels.
MAX_PICTURE_PIXELS = 2**28 // 3
# What people put into data sets. EPS and the like are left out: Pillow would start a program to read them.
# MPO, the pair of pictures of some phones, is opened by the JPEG reader and has no name of its own here.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# `pad` makes a square of the long side: above this length the picture is made smaller first (512 MiB otherwise).
MAX_PADDED_SIDE = 8192
# The processor makes the short side as long as the tower wants and cuts out the middle: ends further out than this
# many short sides are cut before (1 x 20000 pixels would be 336 x 6.7 million on the way).
MAX_CROPPED_RATIO = 64


class PictureError(ValueError):
    """A picture that cannot be used: `path` and `reason`."""

    def __init__(self, path, reason):
        super().__init__(f"cannot use the picture {str(path)!r}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self):
        """Let the error travel from a data loader's worker with its path and reason."""
        return type(self), (self.path, self.reason)


def open_picture(path, upright=False) -> Image.Image:
    """Return the picture as RGB; PictureError(path, reason) if it is missing, broken, too large or no picture.

    path: a file, or an open one such as io.BytesIO. The size is read from the header before anything is decoded.
    upright: turn it as its EXIF entry says. For people's own pictures; training, like LLaVA's, leaves it as stored.
    """
    if not upright and isinstance(path, (str, os.PathLike, io.BytesIO)):
        pixels = read_jpeg(path, MAX_PICTURE_PIXELS)
        if pixels is not None:
            return Image.fromarray(pixels)
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PICTURE_PIXELS:
                reason = (
                    f"it is {width} x {height} = {width * height / 1e6:.0f} million pixels, "
                    f"more than {MAX_PICTURE_PIXELS / 1e6:.0f} million. Make it smaller."
                )
                raise PictureError(path, reason)
            picture.load()
            return to_rgb(ImageOps.exif_transpose(picture) if upright else picture, picture)
    except PictureError:
        raise
    except UnfitPixels as error:
        raise PictureError(path, str(error)) from error
    except FileNotFoundError as error:
        raise PictureError(path, "there is no such file.") from error
    # Pillow's readers raise nearly everything on a broken file: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise PictureError(path, f"{type(error).__name__}: {error}") from error


def load_image_from_base64(image) -> Image.Image:
    """Return the picture of a base64 text, as RGB; PictureError as in open_picture."""
    try:
        data = base64.b64decode(image)
    except ValueError as error:
        raise PictureError("base64 text", str(error)) from error
    return open_picture(io.BytesIO(data))


def to_rgb(picture, stored=None) -> Image.Image:
    """Return the picture as RGB, whatever its mode; transparency is dropped, the colours below it stay.

    So did transformers 4.37, with which LLaVA's checkpoints were trained; 5.x would paint transparent parts white.
    More than 8 bits a pixel are scaled by their range: see bit_depth.py. stored: as to_8_bits takes it.
    """
    if "transparency" in picture.info:
        # The entry would outlive the conversion, and transformers 5 looks at it.
        picture = picture.copy()
        del picture.info["transparency"]
    if is_deep(picture):
        picture = to_8_bits(picture, stored)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def expand2square(pil_img, background_color) -> Image.Image:
    """Return the picture in the middle of a square of its long side, as RGB.

    background_color: (r, g, b), or one number for all three, 0 to 255. LLaVA keeps the picture's mode, in which the
    colour of the square is an error (grey), another (CMYK), or makes others wrong (a palette).
    """
    picture = to_rgb(pil_img)
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    colour = (background_color,) * 3 if isinstance(background_color, int) else tuple(background_color)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square


def prepare_picture(pil, image_processor, aspect_ratio="square", grid_pinpoints=None) -> torch.Tensor:
    """Return the picture as the tower reads it: float32 [3, H, W], or its crops [n, 3, H, W] for `anyres`.

    aspect_ratio: `square`, what the processor makes of it (CLIP cuts out the middle); `pad`, first put on a square of
    the mean colour, so that nothing is cut; `anyres`, cut into crops (grid_pinpoints: as in process_anyres_image).
    """
    try:
        steps = read_steps(image_processor)
    except OtherSteps:
        return _called(pil, image_processor, aspect_ratio, grid_pinpoints)
    return steps.normalise(picture_bytes(pil, steps, aspect_ratio, grid_pinpoints))


def picture_bytes(
    pil, steps: PictureSteps, aspect_ratio="square", grid_pinpoints=None, resize: Resize = "exact"
) -> torch.Tensor:
    """Return what `prepare_picture` does before it is normalised, uint8: a tower that gets these normalises itself.

    steps: of the tower's image processor. resize: `exact`, Pillow's bytes, or `fast`, torch's, up to 1e-3 away in the
    mean once normalised.
    """
    _check_aspect_ratio(aspect_ratio)
    if aspect_ratio == "anyres":
        whole = steps.size if isinstance(steps.size, int) else steps.side
        crops = _cut(pil, whole, steps.side, grid_pinpoints)
        return torch.stack([resized_bytes(crop, steps, resize=resize) for crop in crops])
    picture, pad = to_rgb(pil), aspect_ratio == "pad"
    if pad:
        picture = _shrunk(picture)
    elif steps.crop is not None and isinstance(steps.size, int):
        picture = _middle(picture)
    return resized_bytes(picture, steps, pad, resize)


def _called(pil, image_processor, aspect_ratio, grid_pinpoints) -> torch.Tensor:
    """Return prepare_picture's by the image processor itself."""
    _check_aspect_ratio(aspect_ratio)
    if aspect_ratio == "anyres":
        side = picture_side(image_processor)
        crops = _cut(pil, image_processor.size.get("shortest_edge", side), side, grid_pinpoints)
        return image_processor(crops, return_tensors="pt")["pixel_values"].float()
    picture = to_rgb(pil)
    if aspect_ratio == "pad":
        background = tuple(int(255 * mean) for mean in image_processor.image_mean)
        picture = expand2square(_shrunk(picture), background)
    elif _cuts_the_middle(image_processor):
        picture = _middle(picture)
    pixels = image_processor(picture, return_tensors="pt")["pixel_values"]
    return pixels[0].float()


def _cut(image, base_size, side, grid_pinpoints) -> list[Image.Image]:
    # Pillow resizes most modes by itself; of more than 8 bits to_rgb knows the range.
    picture = to_rgb(image) if is_deep(image) else image
    crops = cut_crops(picture, grid_pinpoints or default_pinpoints(side), base_size, side)
    return [to_rgb(crop) for crop in crops]


def _check_aspect_ratio(aspect_ratio) -> None:
    if aspect_ratio not in ASPECT_RATIOS:
        raise ValueError(f"unknown image_aspect_ratio {aspect_ratio!r}; known: {', '.join(ASPECT_RATIOS)}.")


def process_anyres_image(image, processor, grid_pinpoints=None) -> torch.Tensor:
    """Return the crops of a picture as the tower reads them, float32 [n, 3, H, W]: the whole first, then the tiles.

    grid_pinpoints: resolutions as in read_pinpoints; None for LLaVA-1.6's five at the tower's size. As in LLaVA the
    picture is resized in its own mode: a palette takes the nearest pixel, transparent parts lose their colour.
    """
    return prepare_picture(image, processor, "anyres", grid_pinpoints)


def process_images(images, image_processor, model_cfg) -> torch.Tensor | list[torch.Tensor]:
    """Return the pictures, prepared as `model_cfg.image_aspect_ratio` says (absent or None: `square`).

    images: PIL pictures, or arrays [H, W, 3] of 0 to 255 (uint8).
    [N, 3, H, W]; for `anyres` [N, n, 3, H, W], or a list of [n, 3, H, W] if they have unequal numbers of crops.
    """
    # LLaVA hands them to the processor, which takes one picture alone too, and arrays [H, W, 3].
    images = [images] if isinstance(images, Image.Image) else images
    images = [Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in images]
    # Evaluation tools hand over any object, with this one attribute or without it.
    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None) or "square"
    pinpoints = getattr(model_cfg, "image_grid_pinpoints", None)
    prepared = [prepare_picture(image, image_processor, aspect_ratio, pinpoints) for image in images]
    return torch.stack(prepared) if len({pixels.shape for pixels in prepared}) == 1 else prepared


def picture_side(image_processor) -> int:
    """Return the side in pixels of the square pictures that an image processor puts out."""
    size = getattr(image_processor, "crop_size", None) or image_processor.size
    return size["height"] if "height" in size else size["shortest_edge"]


def load_image_processor(path_or_id, revision=None, **hub):
    """Return the image processor of a folder or a hub id, the one that works on PIL pictures.

    hub: what else from_pretrained takes to find the files (token, cache_dir, local_files_only, subfolder).
    The others need torchvision, and resize a little differently from what LLaVA's checkpoints have seen.
    """
    # From its own file: transformers 5.17 offers it at the top only where torchvision is installed.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    found = AutoImageProcessor.from_pretrained(path_or_id, revision=revision or "main", backend="pil", **hub)
    return one_crop_processor(found)


def one_crop_processor(image_processor):
    """Return an image processor that prepares a picture as it is: LlavaNext's cuts crops, which is done here."""
    if not hasattr(image_processor, "image_grid_pinpoints"):
        return image_processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    settings = image_processor.to_dict()
    for key in ("image_grid_pinpoints", "image_processor_type", "do_pad", "pad_size", "processor_class"):
        settings.pop(key, None)
    return CLIPImageProcessorPil(**settings)


def _cuts_the_middle(image_processor) -> bool:
    return bool(image_processor.do_center_crop) and "shortest_edge" in image_processor.size


def _shrunk(picture) -> Image.Image:
    width, height = picture.size
    side = max(width, height)
    if side <= MAX_PADDED_SIDE:
        return picture
    scale = MAX_PADDED_SIDE / side
    return picture.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)


def _middle(picture) -> Image.Image:
    width, height = picture.size
    longest = MAX_CROPPED_RATIO * min(width, height)
    if max(width, height) <= longest:
        return picture
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return picture.crop((left, top, left + min(width, longest), top + min(height, longest)))
