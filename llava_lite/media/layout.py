"""Count the crops and features of an image: the layout that model, processor and data share."""

import math
from dataclasses import dataclass
from functools import lru_cache

from llava_lite.constants import MERGE_TYPES
from llava_lite.media.anyres import (
    check_grids,
    default_pinpoints,
    get_anyres_image_grid_shape,
    read_pinpoints,
    unpadded_box,
)


@dataclass(frozen=True)
class ImageLayout:
    """How an image becomes crops and crops become features; shared by model, processor and data.

    num_features: of one crop. side: patches along a side of a crop. crop_px: pixels along it. aspect_ratio: `anyres`
    cuts several crops, any other makes one. merge_type: one of MERGE_TYPES. pinpoints: resolutions (width, height).
    in_text: whether the features stand in the sequence of tokens. num_boundary: learned vectors around an image.
    channels: order of the colours that the tower sees, rgb or bgr. media: the kinds of files that the tower reads in
    place of an image, each with the options with which load_media loads it; of most towers none.
    """

    num_features: int
    side: int = 0
    crop_px: int = 0
    aspect_ratio: str = "square"
    merge_type: str = "flat"
    pinpoints: tuple[tuple[int, int], ...] = ()
    in_text: bool = True
    num_boundary: int = 0
    channels: str = "rgb"
    media: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()

    def __post_init__(self):
        """Refuse a merge type or resolutions that do not fit the tower."""
        if self.merge_type not in MERGE_TYPES:
            raise ValueError(f"unknown mm_patch_merge_type {self.merge_type!r}; known: {', '.join(MERGE_TYPES)}.")
        if self.is_anyres:
            check_grids(self.pinpoints, self.crop_px)
            if self.merge_type != "flat" and self.num_features != self.side**2:
                raise ValueError(
                    f"mm_patch_merge_type {self.merge_type!r} needs the {self.side} x {self.side} patches of a crop, "
                    f"but the tower gives {self.num_features} features; mm_vision_select_feature must be 'patch'."
                )

    @classmethod
    def read(cls, num_features, side, crop_px, aspect_ratio, merge_type, grid_pinpoints=None):
        """Return the layout of a checkpoint's keys; without resolutions it has LLaVA-1.6's five."""
        pinpoints = ()
        if aspect_ratio == "anyres":
            pinpoints = tuple(read_pinpoints(grid_pinpoints or default_pinpoints(crop_px), crop_px))
        return cls(num_features, side, crop_px, aspect_ratio or "square", merge_type, pinpoints)

    @property
    def is_anyres(self) -> bool:
        """Whether images are cut into crops."""
        return self.aspect_ratio == "anyres"

    @property
    def media_kinds(self) -> tuple[str, ...]:
        """The kinds of files that the tower reads in place of an image."""
        return tuple(kind for kind, _ in self.media)

    def media_options(self, kind: str) -> dict[str, int]:
        """Return the options with which load_media loads a kind that the tower reads."""
        return dict(dict(self.media)[kind])

    @property
    def unpads(self) -> bool:
        """Whether padding is removed and each row of patches ends in a newline, a weight of the model."""
        return "unpad" in self.merge_type

    def grid(self, size) -> tuple[int, int]:
        """Return (columns, rows) of the tiles of an image of (width, height)."""
        return get_anyres_image_grid_shape(size, self.pinpoints, self.crop_px)

    def num_crops(self, size) -> int:
        """Return the number of crops of an image of (width, height)."""
        return 1 + math.prod(self.grid(size)) if self.is_anyres else 1

    def num_tokens(self, size=None) -> int:
        """Return the number of tokens that an image of (width, height) takes; the size matters only for `anyres`."""
        if not self.in_text:
            return 0
        if not self.is_anyres:
            return self.num_features + self.num_boundary
        return _num_anyres_tokens(self, (int(size[0]), int(size[1]))) + self.num_boundary

    @property
    def most_tokens(self) -> int:
        """The largest number of tokens of an image of any size."""
        if not self.is_anyres:
            return self.num_tokens()
        grids = [(width // self.crop_px, height // self.crop_px) for width, height in self.pinpoints]
        if not self.unpads:
            return self.num_features * (1 + max(math.prod(grid) for grid in grids)) + self.num_boundary
        most = max(rows * self.side * (columns * self.side + 1) for columns, rows in grids)
        return self.num_features + most + self.num_boundary


@lru_cache(maxsize=2**20)
def _num_anyres_tokens(layout, size) -> int:
    columns, rows = layout.grid(size)
    if not layout.unpads:
        return layout.num_features * (1 + columns * rows)
    top, bottom, left, right = unpadded_box(rows * layout.side, columns * layout.side, size)
    return layout.num_features + (bottom - top) * (right - left + 1)
