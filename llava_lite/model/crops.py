"""Merge the features of a picture's crops into the one row of features that stands for it.

N pictures, n crops of one, P features of a crop, D model width, F features of a picture.
"""

from __future__ import annotations

import torch
from einops import rearrange

from llava_lite.anyres import PictureLayout, unpadded_box


def unpad_image(tensor: torch.Tensor, original_size) -> torch.Tensor:
    """Return a map [D, H, W] of a padded picture without the padding; original_size: its (width, height)."""
    top, bottom, left, right = unpadded_box(tensor.shape[1], tensor.shape[2], original_size)
    return tensor[:, top:bottom, left:right]


def crops_of_each(images, image_sizes, layout: PictureLayout) -> list[torch.Tensor]:
    """Return the crops [n, 3, H, W] of each picture.

    images: [N, n, 3, H, W], or a list of [3, H, W] and [n, 3, H, W]. A stack of unequal pictures is filled up with
    zeros, as the processor does; where the sizes tell how many crops are real, the zeros behind them are dropped.
    """
    crops = [picture if picture.dim() == 4 else picture[None] for picture in images]
    shapes = {tuple(picture.shape[1:]) for picture in crops}
    if len(shapes) > 1:
        raise ValueError(f"pictures of one batch must share one shape; got {sorted(shapes)}. Process them alike.")
    if image_sizes is None or not layout.is_anyres:
        return crops
    if len(image_sizes) != len(crops):
        raise ValueError(f"{len(crops)} pictures but {len(image_sizes)} image_sizes; give (width, height) of each.")
    return [_without_filling(picture, size, layout) for picture, size in zip(crops, image_sizes, strict=True)]


def _without_filling(crops: torch.Tensor, size, layout: PictureLayout) -> torch.Tensor:
    count = layout.num_crops(size)
    # A single crop is LLaVA's picture of no grid, such as the blank one of a text.
    if len(crops) in (1, count):
        return crops
    if len(crops) > count and not bool(crops[count:].any()):
        return crops[:count]
    if layout.merge_type != "flat":
        columns, rows = layout.grid(size)
        raise ValueError(
            f"a picture of {size[0]} x {size[1]} pixels is cut into {columns} x {rows} tiles and the whole, but "
            f"{len(crops)} crops were given. image_sizes are (width, height) of the pictures as process_images got "
            "them, in their order."
        )
    return crops


def merge_crops(features: torch.Tensor, size, layout: PictureLayout, newline=None) -> torch.Tensor:
    """Return the features [F, D] of a picture from those of its crops [n, P, D].

    size: (width, height) of the picture. newline: [D], where `layout.unpads`.
    `flat`: crop after crop. `spatial`: the whole picture, then the tiles as one map, row by row. `spatial_unpad`: that
    map without its padding, each row closed by the newline. A single crop stays as it is, closed by a newline.
    Several crops without a grid (no `anyres`), at which LLaVA raises NotImplementedError, stand one after another and
    are closed by one newline.
    """
    if layout.merge_type == "flat":
        return features.flatten(0, 1)
    if len(features) == 1 or not layout.is_anyres:
        rows = features.flatten(0, 1)
        return torch.cat([rows, newline[None]]) if layout.unpads else rows
    whole, tiles = features[0], features[1:]
    if size is None:
        raise ValueError(
            f"mm_patch_merge_type {layout.merge_type!r} needs image_sizes: (width, height) of each picture."
        )
    columns, rows = layout.grid(size)
    tiles = rearrange(tiles, "(r c) (h w) d -> d (r h) (c w)", r=rows, c=columns, h=layout.side)  # [D, H, W]
    if layout.unpads:
        tiles = unpad_image(tiles, size)
        ends = newline[:, None, None].expand(-1, tiles.shape[1], 1)
        tiles = torch.cat([tiles, ends], dim=2)
    return torch.cat([whole, tiles.flatten(1).T])
