"""Turn the address of an image in a request into an image, within limits."""

import base64
import binascii
import io
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from PIL import Image

from llava_lite.media.bit_depth import UnfitPixels
from llava_lite.media.image import IMAGE_FORMATS, ImageError, open_image
from llava_lite.serve.api.chat_request import ImageURL
from llava_lite.serve.api.errors import RequestError
from llava_lite.serve.api.fetch import Refused, fetch

FORMATS = f"Formats that are read: {', '.join(IMAGE_FORMATS[:-1])} and {IMAGE_FORMATS[-1]}."


@dataclass(frozen=True)
class ImageLimits:
    """What a request may show. hosts: those from which images are fetched; timeout_s: of one image."""

    max_images: int = 8
    max_bytes: int = 20 * 2**20
    max_pixels: int = 40_000_000
    hosts: frozenset[str] = frozenset()
    timeout_s: float = 10.0


def read_image(image: ImageURL, limits: ImageLimits) -> Image.Image:
    """Return an image upright and as RGB; RequestError if it is not allowed, too large or broken."""
    return decode_image(image, read_bytes(image, limits), limits)


def read_bytes(image: ImageURL, limits: ImageLimits) -> bytes:
    """Return the bytes of an image's file, fetched where it is an address; RequestError as of `read_image`."""
    try:
        if is_data_url(image.url):
            return decode_url(image.url, limits)
        return fetch(image.url, limits.hosts, limits.max_bytes, limits.timeout_s)
    except Refused as error:
        raise as_request_error(image, str(error)) from error


def decode_image(image: ImageURL, data: bytes, limits: ImageLimits) -> Image.Image:
    """Return the image that a file holds, as `read_image` does."""
    try:
        check_size(data, limits)
        return open_image(io.BytesIO(data), upright=True)
    except Refused as error:
        raise as_request_error(image, str(error)) from error
    except ImageError as error:
        is_sentence = error.__cause__ is None or isinstance(error.__cause__, UnfitPixels)
        reason = error.reason if is_sentence else f"its file is broken ({error.__cause__}). {FORMATS}"
        raise as_request_error(image, reason) from error


def as_request_error(image: ImageURL, reason: str) -> RequestError:
    """Return the error of an image that is not taken."""
    message = f"{image.place}: cannot use the image: {reason}"
    return RequestError(message, param=image.place, code="invalid_image")


def is_data_url(url: str) -> bool:
    """Return whether an image is within its URL."""
    return url[:5].lower() == "data:"


def decode_url(url: str, limits: ImageLimits) -> bytes:
    """Return the bytes of a data URL; its base64 may have line breaks."""
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise Refused(f"the data URL begins with {head[:40]!r}; expected data:image/png;base64,...")
    letters = unquote_to_bytes(data) if "%" in data else data.encode("utf-8", "replace")
    letters = letters.translate(None, b" \t\r\n")
    # Before decoding: 4 letters are 3 bytes.
    check_bytes(len(letters) * 3 // 4 - 2, limits)
    try:
        return base64.b64decode(letters, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(f"it is not base64 ({error}).") from error


def check_bytes(size: int, limits: ImageLimits) -> None:
    """Raise Refused for an image of too many bytes."""
    if size > limits.max_bytes:
        raise Refused(f"it has more than {limits.max_bytes:,} bytes. Make it smaller.")


def check_size(data: bytes, limits: ImageLimits) -> None:
    """Raise Refused for too many bytes or pixels; the size is read from the header, before pixels are decoded."""
    check_bytes(len(data), limits)
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
    # Pillow raises nearly every kind of error for a broken file.
    except Exception as error:
        raise Refused(f"it is no image that can be read. {FORMATS}") from error
    if width * height > limits.max_pixels:
        raise Refused(f"it has {width} x {height} pixels, more than {limits.max_pixels:,}. Make it smaller.")
