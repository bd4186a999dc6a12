"""Merge the features of an image's crops into one sequence of features.

N images, n crops of one, P features of a crop, D model width, F features of an image.
"""

from __future__ import annotations

import torch
from einops import rearrange

from llava_lite.media.anyres import unpadded_box
from llava_lite.media.layout import ImageLayout


def unpad_image(tensor: torch.Tensor, original_size) -> torch.Tensor:
    """Return a map [D, H, W] of a padded image without the padding; original_size: its (width, height)."""
    top, bottom, left, right = unpadded_box(tensor.shape[1], tensor.shape[2], original_size)
    return tensor[:, top:bottom, left:right]


def crops_of_each(images, image_sizes, layout: ImageLayout) -> list[torch.Tensor]:
    """Return the crops [n, 3, H, W] of each image.

    images: [N, n, 3, H, W], or a list of [3, H, W] and [n, 3, H, W]. The processor pads a stack of unequal images with
    crops of zeros; where the sizes give the number of real crops, the padding after them is dropped.
    """
    crops = [image if image.dim() == 4 else image[None] for image in images]
    shapes = {tuple(image.shape[1:]) for image in crops}
    if len(shapes) > 1:
        raise ValueError(f"images of one batch must share one shape; got {sorted(shapes)}. Process them alike.")
    if image_sizes is None or not layout.is_anyres:
        return crops
    if len(image_sizes) != len(crops):
        raise ValueError(f"{len(crops)} images but {len(image_sizes)} image_sizes; give (width, height) of each.")
    return [_without_padding(image, size, layout) for image, size in zip(crops, image_sizes, strict=True)]


def _without_padding(crops: torch.Tensor, size, layout: ImageLayout) -> torch.Tensor:
    count = layout.num_crops(size)
    # A single crop is LLaVA's image without a grid, such as the empty image of a text.
    if len(crops) in (1, count):
        return crops
    if len(crops) > count and not bool(crops[count:].any()):
        return crops[:count]
    if layout.merge_type != "flat":
        columns, rows = layout.grid(size)
        raise ValueError(
            f"an image of {size[0]} x {size[1]} pixels is cut into {columns} x {rows} tiles and an overview, but "
            f"{len(crops)} crops were given. image_sizes are (width, height) of the images as process_images got "
            "them, in their order."
        )
    return crops


def merge_crops(features: torch.Tensor, size, layout: ImageLayout, newline=None) -> torch.Tensor:
    """Return the features [F, D] of an image from those of its crops [n, P, D].

    size: (width, height) of the image. newline: [D], where `layout.unpads`.
    `flat`: crop after crop. `spatial`: the overview, then the tiles as one map, row by row. `spatial_unpad`: that map
    without its padding, each row followed by the newline. A single crop is unchanged, followed by a newline. Several
    crops without a grid (no `anyres`), for which LLaVA raises NotImplementedError, follow one another, with one
    newline at the end.
    """
    if layout.merge_type == "flat":
        return features.flatten(0, 1)
    if len(features) == 1 or not layout.is_anyres:
        rows = features.flatten(0, 1)
        return torch.cat([rows, newline[None]]) if layout.unpads else rows
    overview, tiles = features[0], features[1:]
    if size is None:
        raise ValueError(
            f"mm_patch_merge_type {layout.merge_type!r} needs image_sizes: (width, height) of each image."
        )
    columns, rows = layout.grid(size)
    tiles = rearrange(tiles, "(r c) (h w) d -> d (r h) (c w)", r=rows, c=columns, h=layout.side)  # [D, H, W]
    if layout.unpads:
        tiles = unpad_image(tiles, size)
        ends = newline[:, None, None].expand(-1, tiles.shape[1], 1)
        tiles = torch.cat([tiles, ends], dim=2)
    return torch.cat([overview, tiles.flatten(1).T])
