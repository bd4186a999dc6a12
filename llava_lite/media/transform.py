"""Read from an image processor what it does to an image: resize, centre crop, normalise.

These steps can then be run on bytes, with fewer operations, and normalised on the device: an image in bytes is a
quarter of one in float32. A processor that does anything else is recognised here, and called itself.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


class OtherTransform(ValueError):
    """An image processor does something besides resize, centre crop, rescale and normalise: the reason."""


@dataclass(frozen=True)
class ImageTransform:
    """The steps of an image processor on an RGB image, in this order; sizes are (height, width).

    size: after the resize; one number is the short side, the long side in proportion. crop: of the centre crop, None
    for none. resample: Pillow's filter. Normalisation is (bytes / divisor - mean [3]) / std [3].
    """

    size: tuple[int, int] | int
    crop: tuple[int, int] | None
    resample: int
    divisor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def side(self) -> int:
        """The height of the result in pixels, which is the side of a square one."""
        size = (self.size,) if isinstance(self.size, int) else self.size
        return (self.crop or size)[0]

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) of an image of this width and height after the resize."""
        if not isinstance(self.size, int):
            return self.size[1], self.size[0]
        long = int(self.size * max(width, height) / min(width, height))
        return (self.size, long) if width <= height else (long, self.size)

    def window(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return (left, top, right, bottom) of the centre crop in a resized image of this width and height."""
        if self.crop is None:
            return 0, 0, width, height
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        return left, top, left + self.crop[1], top + self.crop[0]

    @cached_property
    def background(self) -> tuple[int, ...]:
        """The mean colour, which LLaVA pads with."""
        return tuple(int(255 * mean) for mean in self.mean)

    def normalise(self, pixels: torch.Tensor, constants=None) -> torch.Tensor:
        """Return bytes [..., 3, H, W] as the float32 values that the processor computes, bit for bit.

        constants: the result of `constants` for the device of the pixels.
        """
        divisor, mean, std = self.constants(pixels.device) if constants is None else constants
        # In the processor's order. The divisor is a tensor: a GPU divides less exactly by a Python number.
        return pixels.to(torch.float32).div_(divisor).sub_(mean).div_(std)

    def constants(self, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return divisor, mean and std [3, 1, 1] on a device."""
        rows = torch.tensor([(self.divisor,) * 3, self.mean, self.std], dtype=torch.float32, device=device)
        return tuple(rows[:, :, None, None])


def read_transform(image_processor) -> ImageTransform:
    """Return the transform of an image processor; OtherTransform with the reason if it does anything else."""
    from transformers.image_processing_backends import PilBackend

    if not isinstance(image_processor, PilBackend):
        raise OtherTransform(f"{type(image_processor).__name__} does not work on PIL images")
    own = _own_methods(image_processor, PilBackend)
    if own:
        raise OtherTransform(f"{type(image_processor).__name__} has its own {', '.join(own)}")
    missing = [name for name in ("do_resize", "do_rescale", "do_normalize") if not getattr(image_processor, name)]
    if missing or getattr(image_processor, "do_pad", None):
        raise OtherTransform("it pads" if not missing else f"{missing[0]} is off")
    size = _sides(image_processor.size)
    if set(size) not in ({"shortest_edge"}, {"height", "width"}):
        raise OtherTransform(f"it resizes to {size}")
    crop = _sides(image_processor.crop_size) if image_processor.do_center_crop else None
    if crop is not None and set(crop) != {"height", "width"}:
        raise OtherTransform(f"it crops to {crop}")
    transform = ImageTransform(
        size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"]),
        (crop["height"], crop["width"]) if crop else None,
        int(image_processor.resample),
        _divisor(image_processor.rescale_factor),
        _colours(image_processor.image_mean, "image_mean"),
        _colours(image_processor.image_std, "image_std"),
    )
    shortest = (transform.size,) * 2 if isinstance(transform.size, int) else transform.size
    if transform.crop is not None and (transform.crop[0] > shortest[0] or transform.crop[1] > shortest[1]):
        raise OtherTransform(f"it crops {crop} from {size}, which is smaller")
    return transform


def _own_methods(image_processor, base) -> list[str]:
    """Return the methods that a processor adds to or overrides in `base`, except its constructor."""
    kinds = type(image_processor).__mro__
    layers = [vars(kind) for kind in kinds[: kinds.index(base)]] + [vars(image_processor)]
    return sorted({name for layer in layers for name, value in layer.items() if callable(value)} - {"__init__"})


def _sides(size) -> dict[str, int]:
    return {name: int(side) for name, side in dict(size).items() if side is not None}


def _divisor(rescale_factor: float) -> float:
    """Return the divisor in float32 that gives the processor's product in float64, for every byte."""
    values, divisor = np.arange(256), np.float32(round(1 / rescale_factor))
    if not np.array_equal(values.astype(np.float32) / divisor, (values * np.float64(rescale_factor)).astype("f4")):
        raise OtherTransform(f"rescale_factor {rescale_factor} is not a division by a whole number")
    return float(divisor)


def _colours(values, name: str) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise OtherTransform(f"{name} is {values}, not three numbers")
    return tuple(float(value) for value in values)
