"""Images as ImageBind reads them are those of CLIP's image processor."""

import io

import numpy as np
import pytest
import torch
from conftest import draw_image
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_lite.media.image import ImageError
from llava_lite.media.pixels import load_image, normalise


@pytest.mark.parametrize("size", [(300, 224), (224, 260), (640, 480), (50, 30)])
def test_images_are_those_of_clips_processor(size, tmp_path):
    image = draw_image(0).resize(size)
    path = tmp_path / "image.png"
    image.save(path)
    expected = CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(load_image(path), expected)
    assert torch.equal(load_image(path.read_bytes()), expected)
    assert torch.equal(load_image(image), expected)


def test_side_is_that_of_the_encoder():
    assert load_image(draw_image(0), side=32).shape == (3, 32, 32)


def test_a_file_that_is_no_image_is_told():
    with pytest.raises(ImageError, match="cannot use the image '4 bytes'"):
        load_image(b"text")


def test_frames_are_normalised_as_images_are():
    pixels = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    frames = torch.from_numpy(pixels).permute(3, 0, 1, 2).float() / 255
    stream = io.BytesIO()
    Image.fromarray(pixels[1]).save(stream, "PNG")
    # Division by 255 and subtraction of the mean in float32, in another order.
    assert torch.allclose(normalise(frames)[:, 1], load_image(stream.getvalue(), side=8), atol=1e-6)
