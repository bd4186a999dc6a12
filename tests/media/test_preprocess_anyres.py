"""Images of any size and mode as crops: each crop against the pixels of Pillow, normalised by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_lite.media.preprocess import prepare_image
from llava_lite.mm_utils import process_anyres_image, process_images

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
ANYRES = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=PINPOINTS)
# Size, columns and rows of tiles, size of the image on the canvas, its corner there.
FITTED = [
    ((40, 40), (2, 2), (64, 64), (0, 0)),
    ((30, 80), (1, 3), (32, 86), (0, 5)),
    ((80, 30), (3, 1), (86, 32), (5, 0)),
    ((1, 50), (1, 2), (2, 64), (15, 0)),
    ((50, 1), (2, 1), (64, 2), (0, 15)),
    ((1, 3000), (1, 2), (1, 64), (15, 0)),
    ((1, 1), (1, 2), (32, 32), (0, 16)),
    ((200, 199), (2, 2), (64, 64), (0, 0)),
]
MODES = ["RGB", "L", "LA", "RGBA", "P", "CMYK", "1", "YCbCr", "HSV"]


@pytest.fixture
def clip_processor():
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def random_image(width, height, mode="RGB"):
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if mode in ("LA", "RGBA"):
        image = image.convert(mode[:-1] if mode == "RGBA" else "L")
        image.putalpha(Image.fromarray(generator.integers(0, 256, (height, width), dtype=np.uint8)))
        return image
    return image.quantize(16) if mode == "P" else image.convert(mode)


def normalised(image):
    pixels = (np.asarray(image.convert("RGB")) / 255 - MEAN) / STD
    return torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)


def crops_by_hand(image, tiles, fitted, corner):
    canvas = Image.new("RGB", (32 * tiles[0], 32 * tiles[1]))
    canvas.paste(image.resize(fitted).convert("RGB"), corner)
    boxes = [(x, y, x + 32, y + 32) for y in range(0, 32 * tiles[1], 32) for x in range(0, 32 * tiles[0], 32)]
    return torch.stack([normalised(crop) for crop in (image.resize((32, 32)), *map(canvas.crop, boxes))])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("size", "tiles", "fitted", "corner"), FITTED)
def test_crops_are_the_full_image_and_the_tiles_of_the_fitted_image(clip_processor, mode, size, tiles, fitted, corner):
    image = random_image(*size, mode)
    crops = process_anyres_image(image, clip_processor, PINPOINTS)
    assert crops.dtype == torch.float32
    assert torch.allclose(crops, crops_by_hand(image, tiles, fitted, corner), atol=1e-5)


def test_sixteen_bits_a_pixel_are_kept_by_their_upper_half(clip_processor):
    grey = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
    crops = process_anyres_image(Image.fromarray(grey), clip_processor, PINPOINTS)
    eight = process_anyres_image(Image.fromarray((grey / 256).astype(np.uint8)), clip_processor, PINPOINTS)
    assert torch.allclose(crops, eight, atol=0.04)


def test_transparency_of_a_palette_changes_no_colour(clip_processor):
    image = random_image(40, 30, "P")
    expected = process_anyres_image(image, clip_processor, PINPOINTS)
    for transparency in (3, bytes(range(16))):
        image.info["transparency"] = transparency
        assert torch.equal(process_anyres_image(image, clip_processor, PINPOINTS), expected)


def test_an_exif_turn_is_ignored_as_in_training(clip_processor):
    image = random_image(30, 80)
    expected = process_anyres_image(image, clip_processor, PINPOINTS)
    image.getexif()[274] = 6
    assert torch.equal(process_anyres_image(image, clip_processor, PINPOINTS), expected)


def test_equal_grids_are_stacked_and_unequal_ones_listed(clip_processor):
    square, tall = random_image(40, 40), random_image(30, 80)
    assert process_images([square, square], clip_processor, ANYRES).shape == (2, 5, 3, 32, 32)
    listed = process_images([square, tall], clip_processor, ANYRES)
    assert [tuple(crops.shape) for crops in listed] == [(5, 3, 32, 32), (4, 3, 32, 32)]
    assert torch.equal(listed[1], prepare_image(tall, clip_processor, "anyres", PINPOINTS))


@pytest.mark.parametrize("pinpoints", [str(PINPOINTS), "[(32, 64), (64, 32), (64, 64), (96, 32), (32, 96)]", None])
def test_pinpoints_may_be_written_as_text_or_left_out(clip_processor, pinpoints):
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=pinpoints)
    image = random_image(30, 80)
    assert torch.equal(
        process_images([image], clip_processor, config), process_images([image], clip_processor, ANYRES)
    )
    bare = SimpleNamespace(image_aspect_ratio="anyres")
    assert process_images([image], clip_processor, bare).shape == (1, 4, 3, 32, 32)


def test_grids_of_llava_next_are_counted_in_crops(clip_processor):
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints="(1x1),...,(6x6)")
    assert process_images([random_image(500, 100)], clip_processor, config).shape == (1, 1 + 6 * 2, 3, 32, 32)


def test_a_processor_that_cuts_nothing_sees_the_same_crops():
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD)
    image = random_image(30, 80)
    expected = crops_by_hand(image, *FITTED[1][1:])
    assert torch.allclose(process_anyres_image(image, processor, PINPOINTS), expected, atol=1e-5)
