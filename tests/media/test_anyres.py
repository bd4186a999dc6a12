"""Grids, crops and counts of any-resolution images, against tables in plain numbers and a search by hand."""

import math
from fractions import Fraction

import pytest
import torch
from PIL import Image

from llava_lite.media.anyres import (
    cut_crops,
    default_pinpoints,
    divide_to_patches,
    get_anyres_image_grid_shape,
    read_pinpoints,
    resize_and_pad_image,
    select_best_resolution,
)
from llava_lite.media.layout import ImageLayout

LLAVA_1_6 = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def test_the_default_is_the_table_of_llava_1_6():
    assert default_pinpoints(336) == LLAVA_1_6


@pytest.mark.parametrize(
    ("size", "resolution"),
    [
        ((640, 480), (672, 672)),
        ((336, 672), (336, 672)),
        ((300, 1000), (336, 1008)),
        ((2000, 400), (1008, 336)),
        # Nothing of so thin an image is left at any resolution: the smallest canvas, the first of two.
        ((1, 20000), (336, 672)),
        ((20000, 1), (336, 672)),
        # Smaller than every canvas: all keep it complete, the smallest wastes least.
        ((10, 10), (336, 672)),
    ],
)
def test_an_image_goes_where_most_of_it_is_kept(size, resolution):
    assert select_best_resolution(size, LLAVA_1_6) == resolution


def test_the_canvas_keeps_most_pixels_and_then_wastes_least():
    generator = torch.Generator().manual_seed(0)
    grids = [(336 * i, 336 * j) for i in range(1, 4) for j in range(1, 4)]
    for width, height in torch.randint(1, 3000, (200, 2), generator=generator).tolist():
        chosen = select_best_resolution((width, height), grids)

        def kept(pair, size=(width, height)):
            scale = min(pair[0] / size[0], pair[1] / size[1])
            return min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])

        best = max(kept(pair) for pair in grids)
        assert kept(chosen) == best
        assert math.prod(chosen) == min(math.prod(pair) for pair in grids if kept(pair) == best)


def test_pinpoints_are_read_in_every_form_that_checkpoints_write():
    expected = [(336, 672), (672, 336)]
    assert read_pinpoints([[336, 672], [672, 336]], 336) == expected
    assert read_pinpoints("[(336, 672), (672, 336)]", 336) == expected
    assert read_pinpoints("(1x1),...,(2x3)", 384) == [
        (384, 384), (384, 768), (384, 1152), (768, 384), (768, 768), (768, 1152),
    ]  # fmt: skip
    assert get_anyres_image_grid_shape((700, 300), str(LLAVA_1_6), 336) == (3, 1)
    assert len(read_pinpoints("(1x1),...,(6x6)", 336)) == 36


@pytest.mark.parametrize("wrong", ["336", "[336, 672]", [], [[336]], "__import__('os')", [[0, 336]], 7])
def test_what_is_no_list_of_resolutions_is_refused(wrong):
    with pytest.raises(ValueError, match="are not resolutions; give pairs of pixels"):
        read_pinpoints(wrong, 336)


def test_a_resolution_beside_the_grid_is_refused_with_the_usual_ones():
    with pytest.raises(ValueError, match=r"\[\(500, 336\)\] are not multiples of the 336 pixels .* \[\[336, 672\]"):
        cut_crops(Image.new("RGB", (9, 9)), [[500, 336]], 336, 336)
    with pytest.raises(ValueError, match="not multiples of the 336 pixels"):
        ImageLayout.read(576, 24, 336, "anyres", "flat", [[336, 500]])


@pytest.mark.parametrize("size", [(40, 30), (7, 90), (1, 64), (200, 3), (64, 64)])
def test_an_image_lies_in_the_middle_of_a_black_canvas(size):
    canvas = resize_and_pad_image(Image.new("RGB", size, (255, 255, 255)), (96, 64))
    assert canvas.size == (96, 64)
    left, top, right, bottom = canvas.getbbox()
    scale = min(Fraction(96, size[0]), Fraction(64, size[1]))
    fitted = tuple(math.ceil(side * scale) for side in size)
    assert (right - left, bottom - top) == fitted
    assert (left, top) == ((96 - fitted[0]) // 2, (64 - fitted[1]) // 2)


def test_tiles_are_cut_row_by_row_and_the_full_image_comes_first():
    image = Image.new("RGB", (96, 64))
    for i, (left, top) in enumerate([(0, 0), (32, 0), (64, 0), (0, 32), (32, 32), (64, 32)]):
        image.paste((40 * i, 0, 0), (left, top, left + 32, top + 32))
    tiles = divide_to_patches(image, 32)
    assert [tile.getextrema()[0] for tile in tiles] == [(40 * i, 40 * i) for i in range(6)]
    full, *rest = cut_crops(image, [[96, 64]], 32, 32)
    assert full.tobytes() == image.resize((32, 32)).tobytes()
    assert [tile.tobytes() for tile in rest] == [tile.tobytes() for tile in tiles]


@pytest.mark.parametrize(
    ("size", "merge_type", "expected"),
    [
        # 24 x 24 patches a crop. 640 x 480 goes to 2 x 2 tiles: 48 x 48 patches, of which 36 rows are image.
        ((640, 480), "spatial_unpad", 576 + 36 * (48 + 1)),
        ((640, 480), "spatial", 576 * 5),
        ((640, 480), "flat", 576 * 5),
        ((672, 672), "spatial_unpad", 576 + 48 * 49),
        # 72 x 24 patches; int(400 * 72 / 2000) = 14 rows, and half of the 10 left over is cut above and below.
        ((2000, 400), "spatial_unpad", 576 + 14 * 73),
        # 13 rows: of 11 left over 5 are cut above and 5 below, so that 14 stay.
        ((2000, 380), "spatial_unpad", 576 + 14 * 73),
        # Nothing of the tiles is left: the full image alone, without a newline.
        ((20000, 1), "spatial_unpad", 576),
        # Each row is a newline alone.
        ((1, 20000), "spatial_unpad", 576 + 48),
    ],
)
def test_an_image_has_as_many_features_as_its_size_says(size, merge_type, expected):
    layout = ImageLayout.read(576, 24, 336, "anyres", merge_type)
    assert layout.num_tokens(size) == expected
    assert layout.most_tokens == {"spatial_unpad": 576 + 48 * 49}.get(merge_type, 2880)


def test_most_tokens_bounds_every_size():
    generator = torch.Generator().manual_seed(1)
    for pinpoints in (None, "(1x1),...,(6x6)", [[336, 336]]):
        layout = ImageLayout.read(576, 24, 336, "anyres", "spatial_unpad", pinpoints)
        sizes = torch.randint(1, 4000, (300, 2), generator=generator).tolist()
        most = max(layout.num_tokens(size) for size in [*sizes, *layout.pinpoints])
        assert most <= layout.most_tokens
        assert most == max(576 + (h // 14) * (w // 14 + 1) for w, h in layout.pinpoints)


def test_other_aspect_ratios_give_every_image_the_same():
    layout = ImageLayout.read(577, 24, 336, "pad", "spatial_unpad")
    assert layout.num_tokens((640, 480)) == layout.num_tokens() == layout.most_tokens == 577
    assert layout.num_crops((640, 480)) == 1


def test_merge_types_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="unknown mm_patch_merge_type 'unpad'; known: flat, spatial, spatial_unpad"):
        ImageLayout.read(576, 24, 336, "square", "unpad")
    with pytest.raises(ValueError, match="24 x 24 patches of a crop, but the tower gives 577 features"):
        ImageLayout.read(577, 24, 336, "anyres", "spatial")
