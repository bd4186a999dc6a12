"""Resize pictures to bytes as an image processor would, in fewer steps: `exact`, the same bytes, or `fast`, nearly.

Pillow resizes in two passes, first along rows, then along columns, with bytes between. So a square of the mean colour
around a picture need not be there in the first pass, and what a centre crop throws away need not be made at all.
`fast` leaves the filter to torch, whose weights have 16 bits where Pillow's have 22: one byte in 250 is off by one.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from llava_lite.picture_steps import PictureSteps

RESIZES = ("exact", "fast")
Resize = Literal["exact", "fast"]

BICUBIC = int(Image.Resampling.BICUBIC)
# Half the width of the bicubic filter, in pixels of picture or result, whichever are larger.
SUPPORT = 2
# Pillow's weights are whole numbers of 2^-22.
WEIGHT_STEPS = 2**22
# No rounding of Pillow's doubles comes near this, in those steps: a place of 8192 is known to 2e-12, a weight to 8e-6.
SURE = 5e-5


def resized_bytes(picture: Image.Image, steps: PictureSteps, pad: bool = False, resize: Resize = "exact"):
    """Return an RGB picture as the processor of `steps` makes it, before it is normalised: uint8 [3, H, W].

    pad: first put it in the middle of a square of the mean colour, as expand2square does.
    """
    pad = pad and picture.width != picture.height
    if resize == "fast" and steps.resample == BICUBIC:
        return _fast(picture, steps, pad)
    made = _made(picture, steps, pad) if steps.resample == BICUBIC and pass_order() else _plainly(picture, steps, pad)
    # A line of each colour after the other, in which Pillow can write it, is nearer to [3, H, W] than [H, W, 3] is.
    lines = np.frombuffer(made.tobytes("raw", "RGB;L"), np.uint8).reshape(made.height, 3, made.width)
    return torch.from_numpy(np.ascontiguousarray(lines.transpose(1, 0, 2)))


class Run(NamedTuple):
    """Pixels `first` to `last` along one side of a resized picture, made of `start` to `stop` of the picture."""

    first: int
    last: int
    start: float
    stop: float

    def reach(self, size: int) -> tuple[int, int]:
        """Return (first, last) of the picture's pixels, of `size` in all, that the filter reads, and a few more."""
        support = math.ceil(SUPPORT * max(1.0, (self.stop - self.start) / (self.last - self.first))) + 2
        return max(0, math.floor(self.start) - support), min(size, math.ceil(self.stop) + support)


def _run(size: int, length: int, first: int, last: int) -> Run:
    """Return a run that holds `first` to `last` of `size` pixels resized to `length`, the shortest that is sure.

    Pillow takes a box of 32-bit numbers, so a run begins and ends where those are exact. All of it where a weight, or
    a filter, might come out otherwise than in the whole picture.
    """
    if not _is_sure(size, length):
        return Run(0, length, 0, size)
    step = length // math.gcd(length, size)
    # Halves, quarters and so on are exact too.
    step //= step & -step
    first, last = first // step * step, -(-last // step) * step
    return Run(first, last, first * size / length, last * size / length)


@lru_cache(maxsize=65536)
def _is_sure(size: int, length: int) -> bool:
    """Tell whether no weight of Pillow's bicubic filter lies so near a half step that it may be rounded either way.

    The place of a filter is a sum, which a box rounds differently in its last bits; all else is the same.
    """
    scale = size / length
    stretch = max(scale, 1.0)
    centres = (np.arange(length) + 0.5) * scale
    firsts = np.maximum((centres - SUPPORT * stretch + 0.5).astype(int), 0)
    pixels = firsts[:, None] + np.arange(2 * math.ceil(SUPPORT * stretch) + 1)
    x = np.abs(pixels - centres[:, None] + 0.5) / stretch
    # Keys' cubic with a = -1/2.
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0.0))
    weights = np.where(pixels < size, weights, 0.0)
    steps = weights / weights.sum(1, keepdims=True) * WEIGHT_STEPS
    return bool(np.abs(steps - np.floor(steps) - 0.5).min() > SURE)


def _plainly(picture: Image.Image, steps: PictureSteps, pad: bool) -> Image.Image:
    """Return what the processor makes of the picture, by its own steps."""
    if pad:
        side = max(picture.size)
        corner = (side - picture.width) // 2, (side - picture.height) // 2
        picture = _on_canvas(picture, (side, side), corner, steps.background)
    size = steps.resized(*picture.size)
    return picture.resize(size, steps.resample).crop(steps.window(*size))


def _made(picture: Image.Image, steps: PictureSteps, pad: bool) -> Image.Image:
    """Return what the processor makes of the picture, alone or in the middle of a square of the mean colour."""
    side = max(picture.size)
    canvas = (side, side) if pad else picture.size
    size = steps.resized(*canvas)
    window = steps.window(*size)
    corner = [(canvas[axis] - picture.size[axis]) // 2 for axis in (0, 1)]
    runs = [
        _run(canvas[axis], size[axis], *_touched(canvas[axis], size[axis], corner[axis], picture.size[axis], *ends))
        for axis, ends in ((0, window[::2]), (1, window[1::2]))
    ]
    # What lies in neither reach is thrown away before anything is computed.
    reach = [run.reach(whole) for run, whole in zip(runs, canvas, strict=True)]
    box = [max(0, reach[axis][0] - corner[axis]) for axis in (0, 1)]
    box += [min(picture.size[axis], reach[axis][1] - corner[axis]) for axis in (0, 1)]
    piece = picture if box == [0, 0, *picture.size] else picture.crop(box)
    place = [corner[axis] + box[axis] for axis in (0, 1)]
    for axis in (1, 0) if _rows_last(canvas, size) else (0, 1):
        piece, place[axis] = _pass(piece, axis, runs[axis], place[axis], reach[axis], steps.background)
    left, top, right, bottom = window
    if (*place, *piece.size) == (left, top, right - left, bottom - top):
        return piece
    return _on_canvas(piece, (right - left, bottom - top), (place[0] - left, place[1] - top), steps.background)


def _pass(piece: Image.Image, axis: int, run: Run, place: int, reach, colour) -> tuple[Image.Image, int]:
    """Return the piece resized along one axis (0: rows get shorter), and where it then begins.

    place: where it begins on the canvas. Around it the canvas is of one colour, which the other pass keeps: so it
    comes in here and only as far as this pass reaches.
    """
    begin, end = reach
    size = list(piece.size)
    if (place, size[axis]) != (begin, end - begin):
        corner, size[axis] = [0, 0], end - begin
        corner[axis] = place - begin
        piece = _on_canvas(piece, tuple(size), tuple(corner), colour)
    box = [0, 0, *size]
    box[axis], box[axis + 2] = run.start - begin, run.stop - begin
    size[axis] = run.last - run.first
    return piece.resize(size, BICUBIC, box=box), run.first


def _on_canvas(picture: Image.Image, size: tuple[int, int], corner: tuple[int, int], colour) -> Image.Image:
    canvas = Image.new("RGB", size, colour)
    canvas.paste(picture, corner)
    return canvas


def _touched(side: int, length: int, start: int, extent: int, first: int, last: int) -> tuple[int, int]:
    """Return which of `first` to `last` of a resized side have a filter that reads `start` to `start + extent`."""
    scale = side / length
    support = SUPPORT * max(scale, 1.0) + 1
    begin, end = math.floor((start - support) / scale) - 1, math.ceil((start + extent + support) / scale) + 1
    return max(first, begin), min(last, end)


def _rows_last(size: tuple[int, int], new_size: tuple[int, int]) -> bool:
    """Tell whether Pillow resizes columns before rows, as 13 does where far more rows than columns go."""
    less_width, less_height = size[0] - new_size[0], size[1] - new_size[1]
    return pass_order() == "by size" and less_height > max(0, 2 * less_width)


@lru_cache(maxsize=1)
def pass_order() -> str | None:
    """Return when the installed Pillow does columns first: `never` (to 12), `by size` (13); None if otherwise.

    Bytes between the passes are rounded, so the order shows in the result.
    """
    random = np.random.default_rng(0)
    seen = set()
    for width, height, new_width, new_height in random.integers(4, 40, (100, 4)).tolist():
        picture = Image.fromarray(random.integers(0, 256, (height, width), np.uint8))
        size = new_width, new_height
        whole = picture.resize(size, BICUBIC).tobytes()
        rows = picture.resize((new_width, height), BICUBIC).resize(size, BICUBIC).tobytes() == whole
        columns = picture.resize((width, new_height), BICUBIC).resize(size, BICUBIC).tobytes() == whole
        if rows != columns:
            seen.add((columns, height - new_height > max(0, 2 * (width - new_width))))
        elif not rows:
            return None
    if not any(columns for columns, _ in seen):
        return "never"
    return "by size" if all(columns == is_far for columns, is_far in seen) else None


def _fast(picture: Image.Image, steps: PictureSteps, pad: bool) -> torch.Tensor:
    width, height = picture.size
    pixels = np.array(picture)
    if pad:
        pixels = _squared(pixels, steps.background)
        width = height = max(width, height)
    new_width, new_height = steps.resized(width, height)
    left, top, right, bottom = steps.window(new_width, new_height)
    # Channels lie last in memory, the layout for which torch has the quick kernel. It does rows first.
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if _rows_last((width, height), (new_width, new_height)):
        tensor = _interpolated(tensor, (new_height, width))
    return _interpolated(tensor, (new_height, new_width))[0, :, top:bottom, left:right].contiguous()


def _squared(pixels: np.ndarray, colour) -> np.ndarray:
    """Return bytes [H, W, 3] in the middle of a square of one colour."""
    height, width, _ = pixels.shape
    side = max(height, width)
    x, y = (side - width) // 2, (side - height) // 2
    square = np.empty((side, side, 3), np.uint8)
    # Whole rows at once: filled three bytes at a time, a square takes longer than its resize.
    row = np.tile(np.array(colour, np.uint8), (side, 1))
    square[:y], square[y + height :] = row, row
    square[y : y + height, :x], square[y : y + height, x + width :] = row[:x], row[x + width :]
    square[y : y + height, x : x + width] = pixels
    return square


def _interpolated(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
