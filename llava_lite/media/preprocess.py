"""Turn an RGB image into the tensor that a vision tower reads."""

from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from llava_lite.constants import ASPECT_RATIOS
from llava_lite.hub.errors import find_file
from llava_lite.hub.json_files import read_fields
from llava_lite.media.anyres import cut_crops, default_pinpoints
from llava_lite.media.bit_depth import is_deep
from llava_lite.media.image import to_rgb
from llava_lite.media.resize import BICUBIC, Resize, resized_bytes
from llava_lite.media.transform import ImageTransform, OtherTransform, read_transform

# `pad` makes a square of the long side. A longer image is resized to this side first: its square is 192 MiB.
MAX_PADDED_SIDE = 8192
# The processor resizes the short side to the tower's and crops the centre. A longer image is first cut to this many
# short sides: 1 x 20000 pixels would become 336 x 6.7 million.
MAX_CROPPED_RATIO = 64
# Of the images that an image processor makes; towers read at most 1024 pixels a side.
LARGEST_SIDE = 8192


def expand2square(pil_img, background_color) -> Image.Image:
    """Return the image in the middle of a square of its long side, as RGB.

    background_color: (r, g, b), or one number for all three, 0 to 255. LLaVA keeps the image's mode, in which this
    colour is an error (gray), another colour (CMYK), or changes others (a palette).
    """
    image = to_rgb(pil_img)
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    colour = (background_color,) * 3 if isinstance(background_color, int) else tuple(background_color)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def prepare_image(pil, image_processor, aspect_ratio="square", grid_pinpoints=None, box=None) -> torch.Tensor:
    """Return the image as the tower reads it: float32 [3, H, W], or its crops [n, 3, H, W] for `anyres`.

    aspect_ratio: `square`, by the image processor alone (CLIP's crops the centre); `pad`, first padded to a square of
    the mean colour, so that nothing is lost; `anyres`, cut into crops (grid_pinpoints: as in process_anyres_image);
    `random_crop`, the part `box` (left, top, right, bottom) made square, in training, and `square` without a box.
    """
    try:
        transform = read_transform(image_processor)
    except OtherTransform:
        return _by_processor(pil, image_processor, aspect_ratio, grid_pinpoints, box)
    return transform.normalise(image_bytes(pil, transform, aspect_ratio, grid_pinpoints, box=box))


def image_bytes(
    pil, transform: ImageTransform, aspect_ratio="square", grid_pinpoints=None, resize: Resize = "exact", box=None
) -> torch.Tensor:
    """Return the uint8 pixels of `prepare_image` before normalisation, which the tower then does itself.

    transform: of the tower's image processor. resize: `exact`, Pillow's bytes, or `fast`, torch's, whose mean
    difference is at most 1e-3 after normalisation.
    """
    _check_aspect_ratio(aspect_ratio)
    if aspect_ratio == "anyres":
        base_size = transform.size if isinstance(transform.size, int) else transform.side
        crops = _cut(pil, base_size, transform.side, grid_pinpoints)
        return torch.stack([resized_bytes(crop, transform, resize=resize) for crop in crops])
    image, pad = to_rgb(pil), aspect_ratio == "pad"
    if box is not None:
        size = transform.crop or (transform.side, transform.side)
        return resized_bytes(
            image.crop(box), replace(transform, size=size, crop=None, resample=BICUBIC), resize=resize
        )
    if pad:
        image = _limit_side(image)
    elif transform.crop is not None and isinstance(transform.size, int):
        image = _limit_ratio(image)
    return resized_bytes(image, transform, pad, resize)


def _by_processor(pil, image_processor, aspect_ratio, grid_pinpoints, box=None) -> torch.Tensor:
    """Return the pixels of `prepare_image` by a call of the image processor itself."""
    _check_aspect_ratio(aspect_ratio)
    if aspect_ratio == "anyres":
        side = image_side(image_processor)
        crops = _cut(pil, image_processor.size.get("shortest_edge", side), side, grid_pinpoints)
        return image_processor(crops, return_tensors="pt")["pixel_values"].float()
    image = to_rgb(pil)
    if aspect_ratio == "pad":
        background = tuple(int(255 * mean) for mean in image_processor.image_mean)
        image = expand2square(_limit_side(image), background)
    elif box is not None:
        side = image_side(image_processor)
        image = image.crop(box).resize((side, side), Image.Resampling.BICUBIC)
    elif image_processor.do_center_crop and "shortest_edge" in image_processor.size:
        image = _limit_ratio(image)
    pixels = image_processor(image, return_tensors="pt")["pixel_values"]
    return pixels[0].float()


def _cut(image, base_size, side, grid_pinpoints) -> list[Image.Image]:
    # Pillow resizes most modes itself; to_rgb knows the range of more than 8 bits.
    rgb = to_rgb(image) if is_deep(image) else image
    crops = cut_crops(rgb, grid_pinpoints or default_pinpoints(side), base_size, side)
    return [to_rgb(crop) for crop in crops]


def _check_aspect_ratio(aspect_ratio) -> None:
    if aspect_ratio not in ASPECT_RATIOS:
        raise ValueError(f"unknown image_aspect_ratio {aspect_ratio!r}; known: {', '.join(ASPECT_RATIOS)}.")


def process_anyres_image(image, processor, grid_pinpoints=None) -> torch.Tensor:
    """Return the crops of an image as the tower reads them, float32 [n, 3, H, W]: the full image, then the tiles.

    grid_pinpoints: resolutions as in read_pinpoints; None for LLaVA-1.6's five at the tower's size. As in LLaVA the
    image is resized in its own mode: a palette takes the nearest pixel, transparent parts lose their colour.
    """
    return prepare_image(image, processor, "anyres", grid_pinpoints)


def process_images(images, image_processor, model_cfg) -> torch.Tensor | list[torch.Tensor]:
    """Return the images [N, 3, H, W], prepared by `model_cfg.image_aspect_ratio` (absent or None: `square`).

    images: PIL images, or uint8 arrays [H, W, 3]. For `anyres` the result is [N, n, 3, H, W], or a list of
    [n, 3, H, W] if the images have unequal numbers of crops. `model_cfg.image_channels` bgr swaps the colours.
    """
    # LLaVA passes them to the processor, which accepts a single image and arrays [H, W, 3] too.
    images = [images] if isinstance(images, Image.Image) else images
    images = [Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in images]
    # Evaluation tools pass any object, with or without this attribute.
    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None) or "square"
    pinpoints = getattr(model_cfg, "image_grid_pinpoints", None)
    images = [in_channels(image, getattr(model_cfg, "image_channels", "rgb")) for image in images]
    prepared = [prepare_image(image, image_processor, aspect_ratio, pinpoints) for image in images]
    return torch.stack(prepared) if len({pixels.shape for pixels in prepared}) == 1 else prepared


def in_channels(image: Image.Image, channels: str) -> Image.Image:
    """Return an image with its colours in the order rgb or bgr, in which LLaMA-Adapter V2 was trained."""
    if channels == "rgb":
        return image
    red, green, blue = to_rgb(image).split()
    return Image.merge("RGB", (blue, green, red))


def image_side(image_processor) -> int:
    """Return the side in pixels of the square images that an image processor makes."""
    size = getattr(image_processor, "crop_size", None) or image_processor.size
    return size["height"] if "height" in size else size["shortest_edge"]


def load_image_processor(path_or_id, revision=None, **hub):
    """Return the image processor of a directory or a hub id, in its variant for PIL images.

    hub: further arguments of from_pretrained (token, cache_dir, local_files_only, subfolder). The variants for tensors
    need torchvision, and resize slightly differently from the processor with which LLaVA's checkpoints were trained.
    """
    # From its own file: transformers 5.17 exports it at the top only if torchvision is installed.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    for name in ("preprocessor_config.json", "processor_config.json"):
        with suppress(OSError):
            file = find_file(path_or_id, name, hub | {"revision": revision or "main"})
            if file is not None:
                check_image_sizes(file, read_fields(file))
    found = AutoImageProcessor.from_pretrained(
        path_or_id, revision=revision or "main", backend="pil", trust_remote_code=False, **hub
    )
    return one_crop_processor(found)


def check_image_sizes(path, fields: dict) -> None:
    """Raise ValueError for an image processor that would make images of more than LARGEST_SIDE pixels a side."""
    for key in ("size", "crop_size", "pad_size", "image_size"):
        named = fields.get(key)
        for side in named.values() if isinstance(named, dict) else [named]:
            if side is None:
                continue
            if not isinstance(side, (int, float)) or isinstance(side, bool) or not 0 < side <= LARGEST_SIDE:
                raise ValueError(
                    f"{path}: {key} is {named!r}; expected pixels, at most {LARGEST_SIDE:,} a side. It is not of a "
                    "vision tower; copy it again, or take another."
                )
    if isinstance(fields.get("image_processor"), dict):
        check_image_sizes(path, fields["image_processor"])


def one_crop_processor(image_processor):
    """Return an image processor of single crops: LlavaNext's would cut crops, which `cut_crops` does here."""
    if not hasattr(image_processor, "image_grid_pinpoints"):
        return image_processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    settings = image_processor.to_dict()
    for key in ("image_grid_pinpoints", "image_processor_type", "do_pad", "pad_size", "processor_class"):
        settings.pop(key, None)
    return CLIPImageProcessorPil(**settings)


def _limit_side(image) -> Image.Image:
    width, height = image.size
    side = max(width, height)
    if side <= MAX_PADDED_SIDE:
        return image
    scale = MAX_PADDED_SIDE / side
    return image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)


def _limit_ratio(image) -> Image.Image:
    width, height = image.size
    longest = MAX_CROPPED_RATIO * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))
