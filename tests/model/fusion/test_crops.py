"""Crops merged into images, against a plain loop."""

import math

import pytest
import torch

from llava_lite.media.layout import ImageLayout
from llava_lite.model.fusion.crops import crops_of_each, merge_crops, unpad_image

PINPOINTS = ((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))
SIZES = [(40, 40), (1, 50), (50, 1), (1, 2000), (2000, 1), (37, 91), (200, 30), (97, 33), (333, 500), (1, 1)]


def get_layout(merge_type, aspect_ratio="anyres"):
    return ImageLayout(16, 4, 32, aspect_ratio, merge_type, PINPOINTS)


def by_hand(features, size, layout, newline):
    """Walk over the map patch by patch: the crop that a patch lies in, the place in it, is it padding."""
    columns, rows = layout.grid(size)
    width, height = size
    rows_of_map, columns_of_map = rows * 4, columns * 4
    # The image as it lies on the canvas, in complete patches; half of the padding lies on each side.
    if width / height > columns_of_map / rows_of_map:
        left, top = 0, (rows_of_map - int(height * (columns_of_map / width))) // 2
    else:
        left, top = (columns_of_map - int(width * (rows_of_map / height))) // 2, 0
    vectors = list(features[0])
    for y in range(top, rows_of_map - top):
        for x in range(left, columns_of_map - left):
            tile = 1 + (y // 4) * columns + x // 4
            vectors.append(features[tile][(y % 4) * 4 + x % 4])
        vectors.append(newline)
    return torch.stack(vectors)


@pytest.mark.parametrize("size", SIZES)
def test_tiles_become_one_map_without_its_padding(size):
    layout = get_layout("spatial_unpad")
    features = torch.randn(layout.num_crops(size), 16, 6, generator=torch.Generator().manual_seed(0))
    newline = torch.full((6,), 9.0)
    merged = merge_crops(features, size, layout, newline)
    assert torch.equal(merged, by_hand(features, size, layout, newline))
    assert len(merged) == layout.num_tokens(size) <= layout.most_tokens


@pytest.mark.parametrize("size", SIZES)
def test_spatial_keeps_every_feature_and_flat_keeps_their_order(size):
    layout = get_layout("spatial")
    features = torch.randn(layout.num_crops(size), 16, 6, generator=torch.Generator().manual_seed(0))
    merged = merge_crops(features, size, layout)
    columns, rows = layout.grid(size)
    expected = [
        features[1 + (y // 4) * columns + x // 4][(y % 4) * 4 + x % 4]
        for y in range(4 * rows)
        for x in range(4 * columns)
    ]
    assert torch.equal(merged, torch.cat([features[0], torch.stack(expected)]))
    flat = get_layout("flat")
    assert torch.equal(merge_crops(features, size, flat), features.reshape(-1, 6))
    assert len(merged) == layout.num_tokens(size) == flat.num_tokens(size) <= flat.most_tokens


@pytest.mark.parametrize(("num_crops", "aspect_ratio"), [(1, "anyres"), (1, "pad"), (3, "pad")])
def test_crops_without_a_grid_stand_in_a_row_and_end_in_one_newline(num_crops, aspect_ratio):
    features, newline = torch.randn(num_crops, 16, 6), torch.ones(6)
    layout = get_layout("spatial_unpad", aspect_ratio)
    merged = merge_crops(features, (40, 40), layout, newline)
    assert torch.equal(merged, torch.cat([features.reshape(-1, 6), newline[None]]))
    assert torch.equal(merge_crops(features, None, get_layout("spatial", aspect_ratio)), features.reshape(-1, 6))


@pytest.mark.parametrize("merge_type", ["flat", "spatial"])
def test_a_stack_is_cut_to_the_crops_that_a_size_has(merge_type):
    layout = get_layout(merge_type)
    stack = torch.randn(3, 5, 3, 32, 32)
    sizes = [(40, 40), (1, 50), (37, 91)]
    stack[1, 3:] = stack[2, 4:] = 0
    assert [len(crops) for crops in crops_of_each(stack, sizes, layout)] == [5, 3, 4]
    assert [len(crops) for crops in crops_of_each(stack, None, layout)] == [5, 5, 5]
    # LLaVA's flat looks at no size, and takes what is there.
    assert [len(crops) for crops in crops_of_each([stack[0]], [(1, 50)], get_layout("flat"))] == [5]
    assert [len(crops) for crops in crops_of_each([stack[0, 0], stack[1, :3]], sizes[:2], layout)] == [1, 3]


def test_unpad_takes_the_rows_off_that_fitting_has_left_black():
    board = torch.arange(8).repeat(2, 8, 1).transpose(1, 2).float()  # each row holds its number
    rows = unpad_image(board, (100, 50))[0, :, 0]
    assert rows.tolist() == [2, 3, 4, 5]
    assert math.prod(unpad_image(board, (50, 100)).shape) == 2 * 8 * 4


def test_sizes_that_do_not_fit_are_refused_with_what_they_ask_for():
    layout = get_layout("spatial_unpad")
    features, newline = torch.randn(3, 16, 6), torch.ones(6)
    with pytest.raises(ValueError, match="40 x 40 pixels is cut into 2 x 2 tiles and an overview, but 3 crops"):
        crops_of_each([torch.zeros(3, 3, 32, 32)], [(40, 40)], layout)
    with pytest.raises(ValueError, match="1 x 50 pixels is cut into 1 x 2 tiles and an overview, but 4 crops"):
        crops_of_each(torch.ones(1, 4, 3, 32, 32), [(1, 50)], layout)
    with pytest.raises(ValueError, match="'spatial_unpad' needs image_sizes"):
        merge_crops(features, None, layout, newline)
    with pytest.raises(ValueError, match="2 images but 1 image_sizes"):
        crops_of_each(torch.randn(2, 3, 3, 32, 32), [(40, 40)], layout)
    with pytest.raises(ValueError, match=r"share one shape; got \[\(3, 16, 16\), \(3, 32, 32\)\]"):
        crops_of_each([torch.randn(3, 16, 16), torch.randn(3, 32, 32)], None, layout)


def test_a_newline_is_drawn_as_wide_as_an_embedding_with_and_without_a_checkpoint(toy_model):
    from llava_lite.model import LlavaConfig, LlavaLlamaForCausalLM

    built = toy_model(mm_patch_merge_type="spatial_unpad", image_aspect_ratio="anyres")
    config = LlavaConfig(**(built.config.to_dict() | {"hidden_size": 4096, "num_hidden_layers": 1, "vocab_size": 8}))
    torch.manual_seed(0)
    drawn = LlavaLlamaForCausalLM(config).model.image_newline
    assert float(drawn.detach().std() * 64) == pytest.approx(1, abs=0.05)
    assert 0.3 < float(built.model.image_newline.detach().std()) * 32**0.5 < 2
    assert not hasattr(toy_model().model, "image_newline")
