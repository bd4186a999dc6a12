"""Random crops: within the bounds of torchvision's RandomResizedCrop, and a function of their key."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from llava_lite.media.preprocess import image_bytes, load_image_processor, prepare_image
from llava_lite.media.random_crop import random_box
from llava_lite.media.transform import read_transform


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (224, 224), (37, 41)])
def test_a_box_keeps_nine_tenths_of_the_area_and_a_ratio_near_one(size):
    boxes = [random_box(size, str(k)) for k in range(400)]
    areas = np.array([(right - left) * (bottom - top) for left, top, right, bottom in boxes]) / (size[0] * size[1])
    ratios = np.array([(right - left) / (bottom - top) for left, top, right, bottom in boxes])
    # A side is rounded to a pixel.
    slack = 1.5 / min(size)
    assert areas.min() > 0.9 - 2 * slack
    assert areas.max() <= 1
    assert ratios.min() > 3 / 4 * (1 - 2 * slack)
    assert ratios.max() < 4 / 3 * (1 + 2 * slack)
    assert all(0 <= left < right <= size[0] and 0 <= top < bottom <= size[1] for left, top, right, bottom in boxes)
    assert len(set(boxes)) > 20


def test_a_box_depends_on_its_key_alone():
    random.seed(1)
    first = random_box((500, 500), "7 0 3 0")
    random.seed(2)
    torch.manual_seed(5)
    assert random_box((500, 500), "7 0 3 0") == first
    assert len({random_box((500, 500), key) for key in ("7 0 3 0", "8 0 3 0", "7 1 3 0", "7 0 4 0", "7 0 3 1")}) == 5


@pytest.mark.parametrize(("size", "expected"), [((2000, 10), (993, 0, 1006, 10)), ((10, 2000), (0, 993, 10, 1006))])
def test_the_middle_of_a_narrow_image_is_taken(size, expected):
    left, top, right, bottom = random_box(size, "any")
    assert (left, top, right, bottom) == expected
    assert 3 / 4 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-9


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_crop_is_resized_to_a_square_by_pillows_bicubic_filter(toy_tower_dir, kind):
    processor = load_image_processor(toy_tower_dir(kind))
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    image, box = Image.fromarray(pixels), (3, 1, 61, 47)
    expected = np.asarray(image.crop(box).resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    transform = read_transform(processor)
    assert np.array_equal(image_bytes(image, transform, "random_crop", box=box).numpy(), expected)
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    prepared = prepare_image(image, processor, "random_crop", box=box)
    torch.testing.assert_close(prepared, (torch.from_numpy(expected.copy()) / 255 - mean) / std)
    # Inference has no draw and takes what the tower's own processor takes.
    assert torch.equal(prepare_image(image, processor, "random_crop"), prepare_image(image, processor))
    assert prepared.shape == (3, 32, 32)


def test_a_processor_of_other_steps_gets_the_square(toy_tower_dir):
    processor = load_image_processor(toy_tower_dir("clip"))
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8))
    expected = prepare_image(image, processor, "random_crop", box=(2, 2, 60, 46))
    processor.do_pad = True
    assert torch.allclose(prepare_image(image, processor, "random_crop", box=(2, 2, 60, 46)), expected, atol=1e-6)
