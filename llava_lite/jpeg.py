"""Decode plain JPEG files by simplejpeg where it is installed and gives Pillow's bytes; all others are Pillow's.

Plain: baseline, three components of 8 bits in YCbCr, at 4:4:4, 4:2:2 or 4:2:0. What else a file may hold, and every
file that is broken, is left to Pillow, so that it alone decides what is a picture and what is wrong with it.
"""

import io
import struct
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image

START = b"\xff\xd8"
BASELINE, SCAN, ADOBE = 0xC0, 0xDA, 0xEE
# Frames of other kinds: progressive, lossless, arithmetic coding. C4, C8 and CC are no frames.
OTHER_FRAMES = set(range(0xC1, 0xD0)) - {0xC4, 0xC8, 0xCC}
# The luminance's sampling factors, those of both colours being 1 x 1.
SAMPLINGS = (0x11, 0x21, 0x22)


def read_jpeg(path, max_pixels: int) -> np.ndarray | None:
    """Return the bytes [H, W, 3] of a JPEG; None if Pillow is to read it, or no other library is installed.

    path: a file, or its content as io.BytesIO.
    """
    decode = find_decoder()
    if decode is None:
        return None
    try:
        data = path.getvalue() if isinstance(path, io.BytesIO) else _content(path)
        size = plain_size(data)
        return decode(data) if size is not None and size[0] * size[1] <= max_pixels else None
    # Pillow finds the same fault, if it is one to it, and words it.
    except Exception:
        return None


def _content(path) -> bytes:
    with open(path, "rb") as file:
        start = file.read(len(START))
        return start + file.read() if start == START else b""


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) from the header of a plain JPEG, None for any other."""
    at, size = len(START), None
    if data[:at] != START:
        return None
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, (length,) = data[at + 1], struct.unpack_from(">H", data, at + 2)
        part = data[at + 4 : at + 2 + length]
        if marker in OTHER_FRAMES or (marker == ADOBE and part[:5] == b"Adobe" and part[11:12] != b"\x01"):
            return None
        if marker == BASELINE:
            size = _size_of_frame(part)
            if size is None:
                return None
        if marker == SCAN:
            return size
        at += 2 + length
    return None


def _size_of_frame(part: bytes) -> tuple[int, int] | None:
    if len(part) != 15:
        return None
    bits, height, width, num_components = struct.unpack_from(">BHHB", part)
    ids, samplings = part[6::3], part[7::3]
    is_plain = bits == 8 and num_components == 3 and ids == b"\x01\x02\x03"
    is_plain = is_plain and samplings[0] in SAMPLINGS and samplings[1:] == b"\x11\x11"
    return (width, height) if is_plain and width and height else None


@lru_cache(maxsize=1)
def find_decoder() -> Callable[[bytes], np.ndarray] | None:
    """Return a decoder, bytes of a file -> [H, W, 3], that gives Pillow's bytes; None if none is installed.

    It must raise an error at a file that is cut short, where PyTurboJPEG only warns.
    """
    try:
        from simplejpeg import decode_jpeg

        return decode_jpeg if all(np.array_equal(decode_jpeg(data), _by_pillow(data)) for data in _probes()) else None
    # Not installed, without its shared library, or of another version of libjpeg.
    except Exception:
        return None


def _by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as picture:
        return np.array(picture)


def _probes() -> list[bytes]:
    """Return small files of noise and of slopes, in every plain sampling, of odd sizes, of low and high quality."""
    random, probes = np.random.default_rng(0), []
    rows, columns = np.mgrid[:33, :47]
    slopes = np.stack([rows * 7, columns * 5, (rows * columns) % 256], axis=-1)
    for pixels, quality in ((random.integers(0, 256, slopes.shape), 50), (slopes, 95)):
        for sampling in range(len(SAMPLINGS)):
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=quality, subsampling=sampling)
            probes.append(buffer.getvalue())
    return probes
