"""Turn whatever a caller gives for an image (PIL, path, address, bytes, array, tensor) into an upright RGB one.

H, W: sides in pixels; C: channels, 1 (gray), 3 (RGB) or 4 (RGBA).
"""

import base64
import binascii
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps

from llava_lite import __version__
from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.mm_utils import PictureError, open_picture, to_rgb

# What begins an address and no path; how long to wait for what it names.
ADDRESSES = ("http://", "https://", "data:")
TIMEOUT_S = 30
CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
# The longest name of a file is shorter; the base64 of the smallest image is not.
LEAST_BASE64_LEN = 90
EXPECTED = (
    "a PIL image, a path, an address (http://, data:, file://), the bytes of a file, an open file, a numpy array or "
    "torch tensor of pixels, or an image of `datasets` ({'bytes': ..., 'path': ...})"
)


def upright_picture(image) -> Image.Image:
    """Return an image as RGB, turned as its EXIF entry says.

    Raises PictureError with the reason if what is given is no image, TypeError if it is none of EXPECTED.
    """
    if isinstance(image, Image.Image):
        try:
            return to_rgb(ImageOps.exif_transpose(image), image)
        # Pillow reads a file only now, and raises nearly everything on a broken one.
        except (OSError, SyntaxError, ValueError, IndexError) as error:
            raise PictureError("a PIL image", f"it cannot be read ({type(error).__name__}: {error}).") from error
    if isinstance(image, str):
        image = _of_text(image)
    elif isinstance(image, Mapping):
        image = _of_mapping(image)
    elif isinstance(image, (np.ndarray, torch.Tensor)) or hasattr(image, "__array_interface__"):
        return image_of_array(image)
    if isinstance(image, (bytearray, memoryview)):
        image = bytes(image)
    if isinstance(image, os.PathLike):
        image = Path(image).expanduser()
    if isinstance(image, bytes):
        return _of_bytes(image)
    if not isinstance(image, os.PathLike) and not hasattr(image, "read"):
        raise TypeError(f"an image is {EXPECTED}; got {_described(image)}.")
    return open_picture(image, upright=True)


def image_of_array(pixels) -> Image.Image:
    """Return the RGB image of an array or tensor [H, W, C], [C, H, W] or [H, W].

    Bytes (uint8) and whole numbers of 0 to 255 are taken as they are, floats of at most 1 are times 255. Anything else
    can be meant in two ways and is refused with a ValueError.
    """
    if isinstance(pixels, torch.Tensor):
        pixels = pixels.detach().cpu()
        pixels = (pixels.float() if pixels.dtype == torch.bfloat16 else pixels).numpy()
    pixels = _channels_last(np.asarray(pixels))
    levels = _bytes_of(pixels)
    if levels.shape[2] == 1:
        levels = levels[:, :, 0]
    return to_rgb(Image.fromarray(np.ascontiguousarray(levels)))


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    """Return pixels as [H, W, C]."""
    shape = pixels.shape
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    elif pixels.ndim == 3 and (shape[0] in CHANNELS) and (shape[2] in CHANNELS):
        raise ValueError(
            f"an array of shape {shape} can be meant as [H, W, C] or as [C, H, W]. Give a PIL image "
            "(PIL.Image.fromarray)."
        )
    elif pixels.ndim == 3 and shape[0] in CHANNELS:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] not in CHANNELS or not pixels.size:
        raise ValueError(
            f"an array of shape {shape} is no image; expected [H, W, C], [C, H, W] or [H, W] with 1, 3 or 4 channels, "
            "one image an array."
        )
    return pixels


def _bytes_of(pixels: np.ndarray) -> np.ndarray:
    """Return pixels as uint8."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind not in "iuf":
        raise ValueError(f"an array of {pixels.dtype} is no image; expected uint8, or floats of 0 to 1.")
    if not np.isfinite(pixels).all():
        raise ValueError("an array with NaN or infinity is no image; expected uint8, or floats of 0 to 1.")
    least, most = pixels.min(), pixels.max()
    if pixels.dtype.kind == "f" and least >= 0 and most <= 1:
        return np.rint(pixels.astype(np.float64) * 255).astype(np.uint8)
    if least >= 0 and most <= 255 and (pixels == np.floor(pixels)).all():
        return pixels.astype(np.uint8)
    raise ValueError(
        f"an array of {pixels.dtype} from {least:g} to {most:g} can be meant in several ways; give uint8, whole "
        "numbers of 0 to 255, or floats of 0 to 1. Pixels that are normalised already go to the model itself, as "
        "pixel_values."
    )


def _of_text(text: str):
    """Return the path that a text is, or the bytes that it names or holds."""
    if text.startswith(ADDRESSES):
        return fetch(text)
    if text.startswith("file://"):
        return Path(unquote(urlsplit(text).netloc + urlsplit(text).path)).expanduser()
    if len(text) >= LEAST_BASE64_LEN and "." not in text:
        try:
            return base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            pass
    if "\0" in text or not text:
        raise PictureError(text, "it is no path.")
    return Path(text).expanduser()


def _of_mapping(image: Mapping):
    """Return the bytes or the path of an image as `datasets` keeps it undecoded."""
    known = {key: value for key, value in image.items() if key in ("bytes", "path") and value is not None}
    if not known or set(image) - {"bytes", "path"}:
        raise TypeError(f"an image is {EXPECTED}; got a dict with {', '.join(map(repr, image)) or 'nothing in it'}.")
    # A path beside bytes is only the name under which they were found.
    found = known.get("bytes", known.get("path"))
    if not isinstance(found, (str, os.PathLike, bytes, bytearray, memoryview)):
        raise TypeError(f"'bytes' of an image are bytes and its 'path' is a text; got {_described(found)}.")
    return _of_text(found) if isinstance(found, str) else found


def _of_bytes(data: bytes) -> Image.Image:
    try:
        return open_picture(io.BytesIO(data), upright=True)
    except PictureError as error:
        raise PictureError(f"{len(data)} bytes", error.reason) from error


def decoded_base64(text) -> bytes:
    """Return the bytes of base64 text, with or without the head of a data: address."""
    if isinstance(text, (bytes, bytearray)):
        text = bytes(text).decode("ascii", "replace")
    if not isinstance(text, str):
        raise TypeError(f"base64 is a text; got {_described(text)}.")
    data = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise PictureError(f"{text[:40]}...", f"no base64: {error}") from error


def fetch(address: str) -> bytes:
    """Return the bytes that an address of the web, or a data: address itself, holds; PictureError if it has none."""
    if address.startswith("data:"):
        return decoded_base64(address)
    # Some servers, Wikipedia's among them, answer nobody without a name.
    request = Request(address, headers={"User-Agent": f"llava_lite/{__version__}"})
    try:
        with urlopen(request, timeout=TIMEOUT_S) as answer:
            return answer.read()
    except (OSError, HTTPException, ValueError) as error:
        raise PictureError(shortened(address), f"{type(error).__name__}: {error}") from error


def pictures_of_each(images, texts) -> list[list[Image.Image]]:
    """Return one list of upright RGB images for each text, as many as its placeholders.

    images: None, an image, all in the order of the placeholders, or one list (or None) for each text; an array of
    four dimensions is a list of images.
    """
    counts = [text.count(DEFAULT_IMAGE_TOKEN) for text in texts]
    groups = _grouped(images, counts)
    for text, count, group in zip(texts, counts, groups, strict=True):
        if count != len(group):
            raise ValueError(
                f"{count} {DEFAULT_IMAGE_TOKEN} marks but {len(group)} pictures in {shortened(text)!r}. "
                f"{'Remove a mark or add a picture.' if count > len(group) else 'Add a mark or remove a picture.'}"
            )
    return [[upright_picture(image) for image in group] for group in groups]


def as_list(images) -> list:
    """Return the images of one text as a list: None is no image, a single one a list of one."""
    if images is None:
        return []
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return list(images) if images.ndim == 4 else [images]
    is_many = isinstance(images, Sequence) and not isinstance(images, (str, bytes, bytearray, memoryview))
    is_read_on = isinstance(images, Iterator) and not hasattr(images, "read")
    return list(images) if is_many or is_read_on else [images]


def _grouped(images, counts: list[int]) -> list[list]:
    """Deal images to texts: as they were grouped by the caller, else by the number of placeholders."""
    if images is None:
        return [[] for _ in counts]
    images = as_list(images)
    if any(group is None or _is_group(group) for group in images):
        if len(images) != len(counts):
            raise ValueError(f"{len(images)} lists of pictures for {len(counts)} texts; give one list for each text.")
        return [as_list(group) for group in images]
    if len(images) != sum(counts):
        raise ValueError(
            f"{sum(counts)} {DEFAULT_IMAGE_TOKEN} marks in {len(counts)} texts but {len(images)} pictures. "
            "Each mark needs a picture and each picture a mark."
        )
    rest = iter(images)
    return [[next(rest) for _ in range(count)] for count in counts]


def _is_group(value) -> bool:
    is_stack = isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 4
    return is_stack or isinstance(value, (list, tuple))


def shortened(text: str, longest=80) -> str:
    """Return the end of a text, for a message."""
    return text if len(text) <= longest else f"...{text[-longest:]}"


def _described(value) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__}" + (f" {value!r}" if isinstance(value, (int, float, bool)) else "")
