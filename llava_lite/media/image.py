"""Open an image from a file, a URL or bytes, as RGB.

`open_image` is for training and leaves an image as it is stored, like LLaVA. `upright_image` is for images of people
who chat: it accepts every common way to give an image and applies its EXIF orientation.
"""

import base64
import binascii
import io
import os
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps

from llava_lite.media.arrays import array_to_image
from llava_lite.media.bit_depth import UnfitPixels, is_deep, to_8_bits

# 256 MiB decoded as RGB; Pillow itself warns from here on. Phones and cameras have up to 65 million pixels.
MAX_IMAGE_PIXELS = 2**28 // 3
# The formats of public data sets. EPS and similar formats are excluded: Pillow would start a program to read them.
# MPO, the image pair of some phones, is opened by the JPEG reader and needs no name here.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# A text that starts with one of these is a URL and not a path.
URL_STARTS = ("http://", "https://", "data:")
TIMEOUT_S = 30
# As many as the pixels of the largest image, uncompressed.
MAX_DOWNLOAD_BYTES = 2**28
# A file name has at most 255 characters and base64 has no dot; the smallest image has 90 characters of base64.
LEAST_BASE64_LEN = 90
EXPECTED = (
    "a PIL image, a path, a URL (http://, data:, file://), the bytes of a file, an open file, a numpy array or torch "
    "tensor of pixels, or an image of `datasets` ({'bytes': ..., 'path': ...})"
)


class ImageError(ValueError):
    """An image that cannot be used: `path` and `reason`."""

    def __init__(self, path, reason):
        super().__init__(f"cannot use the image {str(path)!r}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self):
        """Pickle path and reason, so that the error reaches the main process from a data-loader worker."""
        return type(self), (self.path, self.reason)


def open_image(path, upright=False) -> Image.Image:
    """Return the image as RGB; ImageError(path, reason) if it is missing, broken, too large or not an image.

    path: a file, or an open one such as io.BytesIO. The size is read from the header before anything is decoded.
    upright: apply the EXIF orientation.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                reason = (
                    f"it is {width} x {height} = {width * height / 1e6:.0f} million pixels, "
                    f"more than {MAX_IMAGE_PIXELS / 1e6:.0f} million. Make it smaller."
                )
                raise ImageError(path, reason)
            image.load()
            return to_rgb(ImageOps.exif_transpose(image) if upright else image, image)
    except ImageError:
        raise
    except UnfitPixels as error:
        raise ImageError(path, str(error)) from error
    except FileNotFoundError as error:
        raise ImageError(path, "there is no such file.") from error
    # Pillow raises nearly every kind of error for a broken file: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise ImageError(path, f"{type(error).__name__}: {error}") from error


def to_rgb(image, stored=None) -> Image.Image:
    """Return the image as RGB, whatever its mode; transparency is dropped and the colours below it stay.

    So did transformers 4.37, with which LLaVA's checkpoints were trained; 5.x would paint transparent parts white.
    More than 8 bits a pixel are scaled by their range: see bit_depth.py. stored: as in to_8_bits.
    """
    if "transparency" in image.info:
        # The entry would survive the conversion, and transformers 5 reads it.
        image = image.copy()
        del image.info["transparency"]
    if is_deep(image):
        image = to_8_bits(image, stored)
    return image if image.mode == "RGB" else image.convert("RGB")


def load_image_from_base64(image) -> Image.Image:
    """Return the image of a base64 text, as RGB; ImageError as in open_image (LLaVA's name)."""
    try:
        data = base64.b64decode(image)
    except ValueError as error:
        raise ImageError("base64 text", str(error)) from error
    return open_image(io.BytesIO(data))


def upright_image(image) -> Image.Image:
    """Return an image in any form as RGB, with its EXIF orientation applied.

    Raises ImageError with the reason if it cannot be read, TypeError if it is none of EXPECTED, ValueError if an array
    can be understood in more than one way.
    """
    if isinstance(image, Image.Image):
        try:
            return to_rgb(ImageOps.exif_transpose(image), image)
        # Pillow reads the file only now, and raises nearly every kind of error for a broken one.
        except (OSError, SyntaxError, ValueError, IndexError) as error:
            raise ImageError("a PIL image", f"it cannot be read ({type(error).__name__}: {error}).") from error
    if isinstance(image, str):
        image = _read_text(image)
    elif isinstance(image, Mapping):
        image = _read_mapping(image)
    elif isinstance(image, (np.ndarray, torch.Tensor)) or hasattr(image, "__array_interface__"):
        return array_to_image(image)
    if isinstance(image, (bytearray, memoryview)):
        image = bytes(image)
    if isinstance(image, os.PathLike):
        image = Path(image).expanduser()
    if isinstance(image, bytes):
        return _read_bytes(image)
    if not isinstance(image, os.PathLike) and not hasattr(image, "read"):
        raise TypeError(f"an image is {EXPECTED}; got {_describe(image)}.")
    return open_image(image, upright=True)


def _read_text(text: str) -> Path | bytes:
    """Return the path that a text is, or the bytes of its URL or of its base64."""
    if text.startswith(URL_STARTS):
        return fetch(text)
    if text.startswith("file://"):
        return Path(unquote(urlsplit(text).netloc + urlsplit(text).path)).expanduser()
    if len(text) >= LEAST_BASE64_LEN and "." not in text:
        try:
            return base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            pass
    if "\0" in text or not text:
        raise ImageError(text, "it is not a path.")
    return Path(text).expanduser()


def _read_mapping(image: Mapping):
    """Return the bytes or the path of an image that `datasets` has not decoded."""
    known = {key: value for key, value in image.items() if key in ("bytes", "path") and value is not None}
    if not known or set(image) - {"bytes", "path"}:
        raise TypeError(f"an image is {EXPECTED}; got a dict with {', '.join(map(repr, image)) or 'nothing in it'}.")
    # A path beside bytes only names the file that they were read from.
    found = known.get("bytes", known.get("path"))
    if not isinstance(found, (str, os.PathLike, bytes, bytearray, memoryview)):
        raise TypeError(f"'bytes' of an image are bytes and its 'path' is a text; got {_describe(found)}.")
    return _read_text(found) if isinstance(found, str) else found


def _read_bytes(data: bytes) -> Image.Image:
    try:
        return open_image(io.BytesIO(data), upright=True)
    except ImageError as error:
        raise ImageError(f"{len(data)} bytes", error.reason) from error


def decode_base64(text) -> bytes:
    """Return the bytes of base64 text, with or without the head of a data URL."""
    if isinstance(text, (bytes, bytearray)):
        text = bytes(text).decode("ascii", "replace")
    if not isinstance(text, str):
        raise TypeError(f"base64 is a text; got {_describe(text)}.")
    data = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{text[:40]}...", f"it is not base64: {error}") from error


def fetch(url: str) -> bytes:
    """Return the bytes of an http(s) or data URL; ImageError if they cannot be read or are too many.

    A server that sends nothing for TIMEOUT_S seconds is given up; at most MAX_DOWNLOAD_BYTES are read.
    """
    if url.startswith("data:"):
        return decode_base64(url)
    # Some servers, Wikipedia's among them, refuse requests without a user agent.
    request = Request(url, headers={"User-Agent": "llava_lite"})
    try:
        with urlopen(request, timeout=TIMEOUT_S) as response:
            data = response.read(MAX_DOWNLOAD_BYTES + 1)
    except (OSError, HTTPException, ValueError) as error:
        raise ImageError(shorten(url), f"{type(error).__name__}: {error}") from error
    if len(data) > MAX_DOWNLOAD_BYTES:
        reason = f"it has more than {MAX_DOWNLOAD_BYTES // 2**20} MiB. Download it and make it smaller."
        raise ImageError(shorten(url), reason)
    return data


def shorten(text: str, longest=80) -> str:
    """Return the end of a text, for a message."""
    return text if len(text) <= longest else f"...{text[-longest:]}"


def _describe(value) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__}" + (f" {value!r}" if isinstance(value, (int, float, bool)) else "")
