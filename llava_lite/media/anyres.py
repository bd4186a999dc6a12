"""Cut an image of any size into crops of the size that the vision tower reads.

LLaVA-1.6, "dynamic high resolution" (Liu et al. 2024, https://llava-vl.github.io/blog/2024-01-30-llava-next/): the
first crop is the full image, resized; then come the tiles of a grid, row by row. Of a few grids the one is chosen that
loses least of the image. Sizes are (width, height) everywhere, as in LLaVA; transformers' LlavaNext has (height,
width).
"""

import ast
import math
import re

from PIL import Image

# LLaVA-OneVision has 36 resolutions, of 5 million pixels at most.
MOST_GRIDS, MOST_PIXELS = 4096, 2**27
# LLaVA-1.6's grids: columns and rows of tiles.
DEFAULT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def select_best_resolution(original_size, possible_resolutions):
    """Return the (width, height) of `possible_resolutions` that keeps most pixels of an image, then wastes least.

    original_size: (width, height). The first of equally good ones is chosen.
    """
    width, height = original_size

    def merit(resolution):
        scale = min(resolution[0] / width, resolution[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return tuple(max(possible_resolutions, key=merit))


def read_pinpoints(grid_pinpoints, patch_size) -> list[tuple[int, int]]:
    """Return the resolutions (width, height) of `grid_pinpoints` in pixels.

    grid_pinpoints: pairs of pixels, the text of a list of pairs, or LLaVA-NeXT's range "(1x1),...,(6x6)" in tiles of
    `patch_size` pixels. Raises ValueError for anything else.
    """
    pairs = grid_pinpoints
    if isinstance(pairs, str):
        # As many characters as the longest list needs, of two numbers each.
        check_grids_count(len(pairs) // 24)
        ends = [(int(a), int(b)) for a, b in re.findall(r"\(\s*(\d+)\s*x\s*(\d+)\s*\)", pairs)]
        if ends:
            (left, low), (right, high) = ends[0], ends[-1]
            check_grids_count((right - left + 1) * (high - low + 1))
            return [(i * patch_size, j * patch_size) for i in range(left, right + 1) for j in range(low, high + 1)]
        try:
            pairs = ast.literal_eval(pairs)
        # The last two for a text that is nested too deeply.
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pairs = None
    if isinstance(pairs, (list, tuple)):
        check_grids_count(len(pairs))
    try:
        read = [(int(width), int(height)) for width, height in pairs]
    except (TypeError, ValueError):
        read = []
    if not read or min(min(pair) for pair in read) < 1 or max(width * height for width, height in read) > MOST_PIXELS:
        raise ValueError(
            f"image_grid_pinpoints {str(grid_pinpoints)[:200]!r} are not resolutions; give pairs of pixels such as "
            "[[336, 672], [672, 336]], or grids such as (1x1),...,(3x3)."
        )
    return read


def check_grids_count(count: int) -> None:
    """Raise ValueError for more resolutions than could be tried for each image."""
    if count > MOST_GRIDS:
        raise ValueError(
            f"image_grid_pinpoints has {count:,} resolutions; at most {MOST_GRIDS:,} can be tried for an image."
        )


def default_pinpoints(patch_size) -> list[list[int]]:
    """Return LLaVA-1.6's five resolutions for a tower of `patch_size` pixels, as its config.json writes them."""
    return [[columns * patch_size, rows * patch_size] for columns, rows in DEFAULT_GRIDS]


def get_anyres_image_grid_shape(image_size, grid_pinpoints, patch_size):
    """Return (columns, rows) of the tiles that an image of (width, height) is cut into."""
    width, height = select_best_resolution(image_size, read_pinpoints(grid_pinpoints, patch_size))
    return width // patch_size, height // patch_size


def resize_and_pad_image(image, target_resolution) -> Image.Image:
    """Return the image resized to fit (width, height), in the middle of a black RGB canvas of that size."""
    width, height = image.size
    target_width, target_height = target_resolution
    scale = min(target_width / width, target_height / height)
    if target_width / width < target_height / height:
        fitted = target_width, min(math.ceil(height * scale), target_height)
    else:
        fitted = min(math.ceil(width * scale), target_width), target_height
    canvas = Image.new("RGB", (target_width, target_height))
    canvas.paste(image.resize(fitted), ((target_width - fitted[0]) // 2, (target_height - fitted[1]) // 2))
    return canvas


def divide_to_patches(image, patch_size) -> list[Image.Image]:
    """Return the square tiles of an image, row by row; the part of a tile outside the image is black."""
    width, height = image.size
    corners = [(left, top) for top in range(0, height, patch_size) for left in range(0, width, patch_size)]
    return [image.crop((left, top, left + patch_size, top + patch_size)) for left, top in corners]


def cut_crops(image, grid_pinpoints, base_size, patch_size) -> list[Image.Image]:
    """Return the crops of an image: the full image, resized to a square of `base_size`, and the tiles of its grid.

    Raises ValueError for a resolution that is not a multiple of `patch_size`: LLaVA would cut more tiles than it
    counts.
    """
    pinpoints = check_grids(read_pinpoints(grid_pinpoints, patch_size), patch_size)
    canvas = resize_and_pad_image(image, select_best_resolution(image.size, pinpoints))
    return [image.resize((base_size, base_size)), *divide_to_patches(canvas, patch_size)]


def check_grids(pinpoints, patch_size):
    """Return the resolutions; ValueError with those that are not multiples of the tower's `patch_size` pixels."""
    odd = [pair for pair in pinpoints if pair[0] % patch_size or pair[1] % patch_size]
    if odd:
        raise ValueError(
            f"image_grid_pinpoints {odd} are not multiples of the {patch_size} pixels that the tower reads; "
            f"the usual ones of this tower are {default_pinpoints(patch_size)}."
        )
    return pinpoints


def unpadded_box(height, width, original_size):
    """Return (top, bottom, left, right) of the part without padding in a map [height, width] of a padded image.

    original_size: (width, height) before resize and padding. The rounding is LLaVA's, with which its checkpoints were
    trained; a thin image may leave no row or no column (transformers' LlavaNext rounds to 7 digits first).
    """
    original_width, original_height = original_size
    if original_width / original_height > width / height:
        padding = (height - int(original_height * (width / original_width))) // 2
        return padding, height - padding, 0, width
    padding = (width - int(original_width * (height / original_height))) // 2
    return 0, height, padding, width - padding
