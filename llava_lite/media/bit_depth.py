"""Turn a gray image of more than 8 bits a pixel into one of 8 bits, by the range of its values; nothing is clipped.

    stored values                            range that becomes 0 to 255
    16 bits, unsigned                        0 to 65,535 (a TIFF of 12 bits: 0 to 4,095)
    integers of 32 bits, or signed           0 to 255; else 0 to 65,535; else minimum to maximum
    floats                                   0 to 1; else 0 to 255; else 0 to 65,535; else minimum to maximum

The first range is used that holds all values. The last one stretches the contrast: only the author of such values (a
CT scan, a depth map) knows which one is black. A TIFF in which zero is white is inverted.
"""

import numpy as np
from PIL import Image

# Integers and floats of 32 bits; Pillow's own conversion clips them at 255.
DEEP_MODES = ("I", "F")
# Modes whose pixels must be read to know whether they can be used.
CHECKED_MODES = ("F",)
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO, UNSIGNED = 0, 1


class UnfitPixels(ValueError):
    """Pixels without a range: the reason."""


def is_deep(image: Image.Image) -> bool:
    """Return whether an image has more than 8 bits a pixel, as Pillow reads it."""
    return image.mode.startswith("I;16") or image.mode in DEEP_MODES


def to_8_bits(image: Image.Image, stored: Image.Image | None = None) -> Image.Image:
    """Return a deep image in mode L. stored: the opened image, if `image` is a rotated copy that lost its TIFF tags.

    Raises UnfitPixels if a number is not finite.
    """
    stored = stored or image
    tags = getattr(stored, "tag_v2", {})
    numbers = np.asarray(image)
    is_unsigned = _tag(tags, BITS_PER_SAMPLE) == 32 and _tag(tags, SAMPLE_FORMAT) in (None, UNSIGNED)
    if numbers.dtype == np.int32 and is_unsigned:
        # Pillow has no unsigned integers of 32 bits.
        numbers = numbers.view(np.uint32)
    if not np.isfinite(numbers).all():
        count = int((~np.isfinite(numbers)).sum())
        raise UnfitPixels(
            f"{count:,} of its {numbers.size:,} pixels are not finite (NaN or infinity), so it has no range. Replace "
            "them and save it with 8 or 16 bits."
        )
    low, high = _range(image.mode, numbers, _tag(tags, BITS_PER_SAMPLE), getattr(stored, "format", None))
    levels = _scaled(numbers, low, high)
    if _tag(tags, PHOTOMETRIC) == WHITE_IS_ZERO:
        levels = 255 - levels
    return Image.fromarray(levels)


def _tag(tags, number: int) -> int | None:
    value = tags.get(number)
    return value[0] if isinstance(value, tuple) else value


def _range(mode: str, numbers: np.ndarray, bits: int | None, kind: str | None) -> tuple[float, float]:
    """Return the values that become 0 and 255."""
    if mode.startswith("I;16"):
        return 0, 4095 if bits == 12 else 65535
    least, largest = float(numbers.min()), float(numbers.max())
    # Pillow reads a PGM of 16 bits as 32.
    known = (65535,) if kind == "PPM" else (1, 255, 65535) if mode == "F" else (255, 65535)
    found = next((high for high in known if least >= 0 and largest <= high), None)
    return (least, largest) if found is None else (0, found)


def _scaled(numbers: np.ndarray, low: float, high: float) -> np.ndarray:
    if (low, high) in ((0, 65535), (0, 4095)):
        # The upper 8 bits, as other readers of 16-bit images do.
        return np.floor(numbers / ((high + 1) / 256)).astype(np.uint8)
    if high == low:
        return np.zeros(numbers.shape, np.uint8)
    return np.rint((numbers.astype(np.float64) - low) * (255 / (high - low))).astype(np.uint8)
