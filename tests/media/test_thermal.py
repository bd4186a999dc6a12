"""Thermal images are grey and from 0 to 1."""

import numpy as np
import torch
from conftest import draw_image
from PIL import Image

from llava_lite.media.thermal import load_thermal


def test_grey_levels_of_a_square_are_those_of_the_file(tmp_path):
    levels = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)
    path = tmp_path / "thermal.png"
    Image.fromarray(levels).save(path)
    found = load_thermal(path, side=16)
    assert found.shape == (1, 16, 16)
    assert torch.equal(found[0], torch.from_numpy(levels).float() / 255)
    # A grey image that is stored with three channels is the same image.
    Image.fromarray(levels).convert("RGB").save(path)
    assert torch.equal(load_thermal(path, side=16), found)


def test_the_short_side_is_resized_and_the_centre_cropped():
    image = draw_image(0).convert("L").resize((90, 60))
    found = load_thermal(image, side=30)
    resized = image.resize((45, 30), Image.Resampling.BICUBIC).crop((7, 0, 37, 30))
    assert torch.equal(found[0], torch.from_numpy(np.array(resized)).float() / 255)
    assert load_thermal(image).shape == (1, 224, 224)
