"""Cut a picture of any size into crops that a tower of fixed size reads, and count the features that come of it.

LLaVA-1.6, "dynamic high resolution" (Liu et al. 2024, https://llava-vl.github.io/blog/2024-01-30-llava-next/): the
whole picture made small comes first, then the tiles of a grid, row by row; the grid is the one of a few that loses
least of the picture. Sizes are (width, height) everywhere, as in LLaVA; transformers' LlavaNext has them the other
way round.
"""

import ast
import math
import re
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from llava_lite.constants import MERGE_TYPES

# LLaVA-1.6's grids: columns and rows of tiles.
DEFAULT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def select_best_resolution(original_size, possible_resolutions):
    """Return the (width, height) of `possible_resolutions` that keeps most pixels of a picture and wastes least.

    original_size: (width, height). Of equals the first stands.
    """
    width, height = original_size

    def merit(resolution):
        scale = min(resolution[0] / width, resolution[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return tuple(max(possible_resolutions, key=merit))


def read_pinpoints(grid_pinpoints, patch_size) -> list[tuple[int, int]]:
    """Return the resolutions (width, height) in pixels that `grid_pinpoints` names.

    grid_pinpoints: pairs, the text of a list of pairs, or LLaVA-NeXT's "(1x1),...,(6x6)", which counts tiles of
    `patch_size` pixels from the first pair to the last. Raises ValueError for anything else.
    """
    pairs = grid_pinpoints
    if isinstance(pairs, str):
        ends = [(int(a), int(b)) for a, b in re.findall(r"\(\s*(\d+)\s*x\s*(\d+)\s*\)", pairs)]
        if ends:
            (left, low), (right, high) = ends[0], ends[-1]
            return [(i * patch_size, j * patch_size) for i in range(left, right + 1) for j in range(low, high + 1)]
        try:
            pairs = ast.literal_eval(pairs)
        except (ValueError, SyntaxError):
            pairs = None
    try:
        read = [(int(width), int(height)) for width, height in pairs]
    except (TypeError, ValueError):
        read = []
    if not read or min(min(pair) for pair in read) < 1:
        raise ValueError(
            f"image_grid_pinpoints {grid_pinpoints!r} are no resolutions; give pairs of pixels such as "
            "[[336, 672], [672, 336]], or grids such as (1x1),...,(3x3)."
        )
    return read


def default_pinpoints(patch_size) -> list[list[int]]:
    """Return LLaVA-1.6's five resolutions for a tower of `patch_size` pixels, as its config.json writes them."""
    return [[columns * patch_size, rows * patch_size] for columns, rows in DEFAULT_GRIDS]


def get_anyres_image_grid_shape(image_size, grid_pinpoints, patch_size):
    """Return (columns, rows) of the tiles that a picture of (width, height) is cut into."""
    width, height = select_best_resolution(image_size, read_pinpoints(grid_pinpoints, patch_size))
    return width // patch_size, height // patch_size


def resize_and_pad_image(image, target_resolution) -> Image.Image:
    """Return the picture as large as fits into (width, height), in the middle of a black RGB canvas of that size."""
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
    """Return the square tiles of a picture, row by row; what a tile has beyond the picture is black."""
    width, height = image.size
    corners = [(left, top) for top in range(0, height, patch_size) for left in range(0, width, patch_size)]
    return [image.crop((left, top, left + patch_size, top + patch_size)) for left, top in corners]


def cut_crops(image, grid_pinpoints, base_size, patch_size) -> list[Image.Image]:
    """Return the crops of a picture: the whole, squeezed to a square of `base_size`, and the tiles of its grid.

    Raises ValueError for a resolution that is no multiple of `patch_size`: LLaVA would cut more tiles than it counts.
    """
    pinpoints = whole_grids(read_pinpoints(grid_pinpoints, patch_size), patch_size)
    canvas = resize_and_pad_image(image, select_best_resolution(image.size, pinpoints))
    return [image.resize((base_size, base_size)), *divide_to_patches(canvas, patch_size)]


def whole_grids(pinpoints, patch_size):
    """Return the resolutions, or raise ValueError naming those that are no multiple of the tower's side."""
    odd = [pair for pair in pinpoints if pair[0] % patch_size or pair[1] % patch_size]
    if odd:
        raise ValueError(
            f"image_grid_pinpoints {odd} are no multiples of the {patch_size} pixels that the tower reads; "
            f"for this tower the usual ones are {default_pinpoints(patch_size)}."
        )
    return pinpoints


def unpadded_box(height, width, original_size):
    """Return (top, bottom, left, right) of what is not padding in a map [height, width] of a padded picture.

    original_size: (width, height) before it was fitted and padded. Roundings are LLaVA's, on which its checkpoints
    were trained; a thin picture may leave no row or no column (transformers' LlavaNext rounds to 7 digits first).
    """
    original_width, original_height = original_size
    if original_width / original_height > width / height:
        padding = (height - int(original_height * (width / original_width))) // 2
        return padding, height - padding, 0, width
    padding = (width - int(original_width * (height / original_height))) // 2
    return 0, height, padding, width - padding


@dataclass(frozen=True)
class PictureLayout:
    """How a picture becomes crops and its crops become features; what model, processor and data agree on.

    num_features: features of one crop. side: patches along a side of a crop. crop_px: pixels along it. aspect_ratio:
    `anyres` cuts crops, any other is one crop. merge_type: one of MERGE_TYPES. pinpoints: resolutions (width, height).
    """

    num_features: int
    side: int = 0
    crop_px: int = 0
    aspect_ratio: str = "square"
    merge_type: str = "flat"
    pinpoints: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        """Refuse what cannot be laid out."""
        if self.merge_type not in MERGE_TYPES:
            raise ValueError(f"unknown mm_patch_merge_type {self.merge_type!r}; known: {', '.join(MERGE_TYPES)}.")
        if self.is_anyres:
            whole_grids(self.pinpoints, self.crop_px)
            if self.merge_type != "flat" and self.num_features != self.side**2:
                raise ValueError(
                    f"mm_patch_merge_type {self.merge_type!r} lays out {self.side} x {self.side} patches of a crop, "
                    f"but the tower gives {self.num_features} features; mm_vision_select_feature must be 'patch'."
                )

    @classmethod
    def read(cls, num_features, side, crop_px, aspect_ratio, merge_type, grid_pinpoints=None):
        """Return the layout that a checkpoint's keys describe; without resolutions LLaVA-1.6's five are meant."""
        pinpoints = ()
        if aspect_ratio == "anyres":
            pinpoints = tuple(read_pinpoints(grid_pinpoints or default_pinpoints(crop_px), crop_px))
        return cls(num_features, side, crop_px, aspect_ratio or "square", merge_type, pinpoints)

    @property
    def is_anyres(self) -> bool:
        """Whether pictures are cut into crops."""
        return self.aspect_ratio == "anyres"

    @property
    def unpads(self) -> bool:
        """Whether padding is taken off and rows end in a newline, a weight of the model."""
        return "unpad" in self.merge_type

    def grid(self, size) -> tuple[int, int]:
        """Return (columns, rows) of the tiles of a picture of (width, height)."""
        return get_anyres_image_grid_shape(size, self.pinpoints, self.crop_px)

    def num_crops(self, size) -> int:
        """Return the number of crops of a picture of (width, height)."""
        return 1 + math.prod(self.grid(size)) if self.is_anyres else 1

    def num_tokens(self, size=None) -> int:
        """Return the number of features of a picture of (width, height), which matters under `anyres` alone."""
        if not self.is_anyres:
            return self.num_features
        return _num_anyres_tokens(self, (int(size[0]), int(size[1])))

    @property
    def most_tokens(self) -> int:
        """The most features that a picture may have, whatever its size."""
        if not self.is_anyres:
            return self.num_features
        grids = [(width // self.crop_px, height // self.crop_px) for width, height in self.pinpoints]
        if not self.unpads:
            return self.num_features * (1 + max(math.prod(grid) for grid in grids))
        return self.num_features + max(rows * self.side * (columns * self.side + 1) for columns, rows in grids)


@lru_cache(maxsize=2**20)
def _num_anyres_tokens(layout, size) -> int:
    columns, rows = layout.grid(size)
    if not layout.unpads:
        return layout.num_features * (1 + columns * rows)
    top, bottom, left, right = unpadded_box(rows * layout.side, columns * layout.side, size)
    return layout.num_features + (bottom - top) * (right - left + 1)


def num_picture_tokens(config, size) -> int:
    """Return the number of features that a picture of (width, height) becomes in a model of this config."""
    return config.picture_layout.num_tokens(size)
