"""The transform of an image processor is read from it, and any other step is reported."""

import numpy as np
import pytest
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_lite.media.transform import OtherTransform, read_transform


class Inverted(CLIPImageProcessorPil):
    def rescale(self, image, scale, **kwargs):
        return 1 - super().rescale(image, scale, **kwargs)


def test_transforms_of_clip_and_siglip():
    clip = read_transform(CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 20, "width": 24}))
    assert (clip.size, clip.crop, clip.resample, clip.divisor, clip.side) == (30, (20, 24), 3, 255, 20)
    assert clip.background == (122, 116, 104)
    assert clip.resized(90, 60) == (45, 30)
    assert clip.resized(60, 91) == (30, 45)
    assert clip.window(45, 30) == (10, 5, 34, 25)
    siglip = read_transform(SiglipImageProcessorPil(size={"height": 32, "width": 40}))
    assert (siglip.size, siglip.crop, siglip.side) == ((32, 40), None, 32)
    assert siglip.resized(90, 60) == (40, 32)
    assert siglip.window(40, 32) == (0, 0, 40, 32)


@pytest.mark.parametrize("kind", [CLIPImageProcessorPil, SiglipImageProcessorPil])
def test_every_byte_becomes_the_value_of_the_processor(kind):
    processor = kind(size={"height": 16, "width": 16}, do_center_crop=False)
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    expected = processor(pixels, return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]
    made = read_transform(processor).normalise(torch.from_numpy(pixels).permute(2, 0, 1))
    assert made.dtype == torch.float32
    assert torch.equal(made, expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"do_resize": False}, "do_resize is off"),
        ({"do_normalize": False}, "do_normalize is off"),
        ({"do_pad": True}, "it pads"),
        ({"size": {"shortest_edge": 10, "longest_edge": 20}}, "it resizes to"),
        ({"rescale_factor": 0.0123}, "rescale_factor 0.0123 is not a division by a whole number"),
        ({"image_mean": [0.5]}, r"image_mean is .0.5.*, not three numbers"),
        ({"size": {"shortest_edge": 100}}, "crops .* from .*, which is smaller"),
    ],
)
def test_other_steps_are_reported(change, reason):
    with pytest.raises(OtherTransform, match=reason):
        read_transform(CLIPImageProcessorPil(**change))


def test_a_processor_with_methods_of_its_own_is_not_replaced():
    with pytest.raises(OtherTransform, match="Inverted has its own rescale"):
        read_transform(Inverted())
    patched = CLIPImageProcessorPil()
    patched.normalize = lambda image, *args, **kwargs: image
    with pytest.raises(OtherTransform, match="has its own normalize"):
        read_transform(patched)
    with pytest.raises(OtherTransform, match="object does not work on PIL images"):
        read_transform(object())
