"""Read from an image processor what it does to a picture: resize, cut out the middle, normalise each colour.

Known beforehand, the first two can be done on bytes in fewer steps, and the last on the device: a picture of bytes is
a quarter of one in float32. A processor that does anything else is told apart here, and called as it is.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


class OtherSteps(ValueError):
    """An image processor does something besides resize, centre crop, rescale and normalise: the reason."""


@dataclass(frozen=True)
class PictureSteps:
    """What is done to an RGB picture, in this order; sizes are (height, width).

    size: what it is resized to; one number for the short side, the long one in proportion. crop: what is cut out of
    the middle, None for all. resample: Pillow's filter. The bytes are then divided by `divisor`, `mean` [3] is taken
    off and the rest divided by `std` [3].
    """

    size: tuple[int, int] | int
    crop: tuple[int, int] | None
    resample: int
    divisor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def side(self) -> int:
        """The side in pixels of what comes out, or its height."""
        size = (self.size,) if isinstance(self.size, int) else self.size
        return (self.crop or size)[0]

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) of a picture of this width and height once it is resized."""
        if not isinstance(self.size, int):
            return self.size[1], self.size[0]
        long = int(self.size * max(width, height) / min(width, height))
        return (self.size, long) if width <= height else (long, self.size)

    def window(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return (left, top, right, bottom) of what is cut out of a resized picture of this width and height."""
        if self.crop is None:
            return 0, 0, width, height
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        return left, top, left + self.crop[1], top + self.crop[0]

    @cached_property
    def background(self) -> tuple[int, ...]:
        """The mean colour, which LLaVA pads with."""
        return tuple(int(255 * mean) for mean in self.mean)

    def normalise(self, pixels: torch.Tensor, constants=None) -> torch.Tensor:
        """Return bytes [..., 3, H, W] as the float32 numbers that the processor makes of them, bit for bit.

        constants: what `constants` returns for the device of the pixels.
        """
        divisor, mean, std = self.constants(pixels.device) if constants is None else constants
        # The processor's own order. All three are tensors: a device divides by a plain number less exactly.
        return pixels.to(torch.float32).div_(divisor).sub_(mean).div_(std)

    def constants(self, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return divisor, mean and std [3, 1, 1] on a device."""
        rows = torch.tensor([(self.divisor,) * 3, self.mean, self.std], dtype=torch.float32, device=device)
        return tuple(rows[:, :, None, None])


def read_steps(image_processor) -> PictureSteps:
    """Return the steps of an image processor; OtherSteps with the reason where it does others."""
    from transformers.image_processing_backends import PilBackend

    if not isinstance(image_processor, PilBackend):
        raise OtherSteps(f"{type(image_processor).__name__} does not work on PIL pictures")
    own = _own_methods(image_processor, PilBackend)
    if own:
        raise OtherSteps(f"{type(image_processor).__name__} has its own {', '.join(own)}")
    missing = [name for name in ("do_resize", "do_rescale", "do_normalize") if not getattr(image_processor, name)]
    if missing or getattr(image_processor, "do_pad", None):
        raise OtherSteps("it pads" if not missing else f"{missing[0]} is off")
    size = _sides(image_processor.size)
    if set(size) not in ({"shortest_edge"}, {"height", "width"}):
        raise OtherSteps(f"it resizes to {size}")
    crop = _sides(image_processor.crop_size) if image_processor.do_center_crop else None
    if crop is not None and set(crop) != {"height", "width"}:
        raise OtherSteps(f"it cuts out {crop}")
    steps = PictureSteps(
        size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"]),
        (crop["height"], crop["width"]) if crop else None,
        int(image_processor.resample),
        _divisor(image_processor.rescale_factor),
        _colours(image_processor.image_mean, "image_mean"),
        _colours(image_processor.image_std, "image_std"),
    )
    shortest = (steps.size,) * 2 if isinstance(steps.size, int) else steps.size
    if steps.crop is not None and (steps.crop[0] > shortest[0] or steps.crop[1] > shortest[1]):
        raise OtherSteps(f"it cuts {crop} out of {size}, which is smaller")
    return steps


def _own_methods(image_processor, base) -> list[str]:
    """Return the methods that a processor does not share with transformers' plain one; its constructor sets values."""
    kinds = type(image_processor).__mro__
    layers = [vars(kind) for kind in kinds[: kinds.index(base)]] + [vars(image_processor)]
    return sorted({name for layer in layers for name, value in layer.items() if callable(value)} - {"__init__"})


def _sides(size) -> dict[str, int]:
    return {name: int(side) for name, side in dict(size).items() if side is not None}


def _divisor(rescale_factor: float) -> float:
    """Return the number by which dividing a byte in float32 equals the processor's product in float64."""
    values, divisor = np.arange(256), np.float32(round(1 / rescale_factor))
    if not np.array_equal(values.astype(np.float32) / divisor, (values * np.float64(rescale_factor)).astype("f4")):
        raise OtherSteps(f"rescale_factor {rescale_factor} is no division by a whole number")
    return float(divisor)


def _colours(values, name: str) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise OtherSteps(f"{name} is {values}, not three numbers")
    return tuple(float(value) for value in values)
