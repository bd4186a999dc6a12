"""Draw the part of an image that a training step sees: a random crop of nearly all of it, made square.

After torchvision's RandomResizedCrop, with the scale of 0.9 to 1 that LLaMA-Adapter V2, ImageBind-LLM and
LLaMA2-Accessory train with. The draw depends on its key alone, so that a resumed run sees the same crops.
"""

import math
import random

# Of the area of the image, and of width to height of the crop.
SCALE = (0.9, 1.0)
RATIO = (3 / 4, 4 / 3)
NUM_TRIES = 10


def random_box(size: tuple[int, int], key: str) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) in pixels of a crop of an image of (width, height), drawn by a key.

    The area is uniform in SCALE and the logarithm of the ratio in RATIO. An image too narrow for it is cropped in its
    middle to the nearest ratio.
    """
    width, height = size
    draws = random.Random(key)
    for _ in range(NUM_TRIES):
        area = width * height * draws.uniform(*SCALE)
        ratio = math.exp(draws.uniform(*map(math.log, RATIO)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = draws.randint(0, width - wide), draws.randint(0, height - high)
            return left, top, left + wide, top + high
    wide = min(width, max(1, round(height * RATIO[1])))
    high = min(height, max(1, round(width / RATIO[0])))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high
