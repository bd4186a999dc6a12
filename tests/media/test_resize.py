"""Exact bytes are those of the image processor, bit for bit; fast ones are within a thousandth."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_lite.media import resize as resize_module
from llava_lite.media.image import to_rgb
from llava_lite.media.preprocess import expand2square, image_bytes, prepare_image
from llava_lite.media.resize import pass_order, resized_bytes
from llava_lite.media.transform import read_transform

# Lengths with many and with few divisors in common with the output; thin, tiny and square images.
SIZES = [(160, 120), (120, 160), (107, 160), (160, 107), (125, 83), (94, 125), (84, 84), (84, 125), (225, 30)]
SIZES += [(30, 225), (63, 217), (25, 220), (331, 97), (67, 41), (1, 1), (1, 60), (60, 1), (2, 3), (37, 128)]


def clip(short, *crop, **options):
    height, width = crop or (short, short)
    crop_size = {"height": height, "width": width}
    return CLIPImageProcessorPil(size={"shortest_edge": short}, crop_size=crop_size, **options)


PROCESSORS = {
    "clip": clip(84),
    "clip small": clip(30),
    "siglip": SiglipImageProcessorPil(size={"height": 96, "width": 96}),
    "siglip oblong": SiglipImageProcessorPil(size={"height": 48, "width": 80}),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}),
    "odd crop": clip(71, 47, 62),
    "bilinear": clip(56, resample=Image.Resampling.BILINEAR),
}


def noise(size, seed=0):
    width, height = size
    random = np.random.default_rng((seed, width, height))
    pixels = random.integers(0, 256, (height, width, 3))
    # Black and white pixels overshoot in both passes, where a wrong order or rounding shows most.
    return Image.fromarray(np.where(random.random() < 0.5, pixels, 255 * (pixels > 127)).astype(np.uint8))


def photo(size, seed=0):
    """Return slopes with some noise, as photographs have them."""
    width, height = size
    random = np.random.default_rng((seed, width, height))
    coarse = random.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + random.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8))


def by_processor(image, processor, pad):
    """Return the pixels as LLaVA makes them: pad to a square, call the processor."""
    if pad:
        image = expand2square(image, tuple(int(255 * mean) for mean in processor.image_mean))
    return processor(image, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("name", PROCESSORS)
def test_no_bit_differs_from_the_image_processor(name, pad):
    processor = PROCESSORS[name]
    transform = read_transform(processor)
    for size in SIZES:
        made = resized_bytes(noise(size), transform, pad)
        assert made.dtype == torch.uint8
        assert made.is_contiguous()
        expected = by_processor(noise(size), processor, pad)
        assert torch.equal(transform.normalise(made), expected), f"{name}, {size}, pad {pad}"


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("size", [(640, 480), (427, 640), (333, 500), (100, 882)])
def test_no_bit_differs_at_llavas_size(size, pad):
    transform = read_transform(clip(336))
    assert torch.equal(
        transform.normalise(resized_bytes(noise(size), transform, pad)), by_processor(noise(size), clip(336), pad)
    )


@pytest.mark.parametrize("pad", [False, True])
def test_no_bit_differs_at_any_length(pad):
    processor = PROCESSORS["clip small"]
    transform = read_transform(processor)
    for side in range(20, 170, 3):
        for size in ((side, 40), (40, side)):
            made = transform.normalise(resized_bytes(noise(size), transform, pad))
            assert torch.equal(made, by_processor(noise(size), processor, pad)), size


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "CMYK", "1", "YCbCr", "I;16"])
@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
def test_no_bit_differs_in_any_mode(mode, aspect_ratio):
    processor = PROCESSORS["clip"]
    image = Image.fromarray(np.arange(150 * 200, dtype=np.uint16).reshape(200, 150)) if mode == "I;16" else None
    image = image or noise((150, 200)).convert(mode)
    expected = by_processor(to_rgb(image), processor, aspect_ratio == "pad")
    assert torch.equal(prepare_image(image, processor, aspect_ratio), expected)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("name", PROCESSORS)
def test_fast_bytes_are_within_a_thousandth(name, pad):
    processor = PROCESSORS[name]
    transform = read_transform(processor)
    for size in SIZES:
        made = transform.normalise(resized_bytes(photo(size), transform, pad, "fast"))
        error = (made - by_processor(photo(size), processor, pad)).abs().mean()
        assert made.shape[1:] == by_processor(photo(size), processor, pad).shape[1:]
        assert error < 1e-3, f"{name}, {size}, pad {pad}: {error}"


def test_fast_crops_of_any_resolution_are_near_the_exact_ones():
    transform, pinpoints = read_transform(PROCESSORS["clip"]), [[168, 168], [84, 252]]
    exact = image_bytes(photo((160, 120)), transform, "anyres", pinpoints)
    fast = image_bytes(photo((160, 120)), transform, "anyres", pinpoints, "fast")
    assert exact.shape == fast.shape == (5, 3, 84, 84)
    assert (transform.normalise(exact) - transform.normalise(fast)).abs().mean() < 1e-3


def test_the_order_of_pillows_passes_is_recognised():
    assert pass_order() in ("never", "by size")


@pytest.mark.parametrize("pad", [False, True])
def test_a_pillow_of_unknown_order_resizes_in_one_call(monkeypatch, pad):
    monkeypatch.setattr(resize_module, "pass_order", lambda: None)
    monkeypatch.setattr(resize_module, "_in_passes", None)
    for name in ("clip", "siglip oblong", "odd crop"):
        processor = PROCESSORS[name]
        transform = read_transform(processor)
        for size in ((160, 120), (25, 220)):
            made = transform.normalise(resized_bytes(noise(size), transform, pad))
            assert torch.equal(made, by_processor(noise(size), processor, pad))


def test_only_pixels_that_are_read_are_resized(monkeypatch):
    """640 x 480 on a square of 640, resized to 336: 252 rows depend on the image, 294 with exact ends."""
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *a, **k: sizes.append(size) or resize(self, size, *a, **k)
    )
    pass_order()
    sizes.clear()
    resized_bytes(noise((640, 480)), read_transform(clip(336)), pad=True)
    resized_bytes(noise((640, 480)), read_transform(clip(336)))
    (rows_first, then), plain = map(tuple, sizes[:2]), [tuple(size) for size in sizes[2:]]
    assert rows_first == (336, 480)
    assert then == (336, 294)
    # The short side becomes 336, the long one 448, of which only the centre is computed.
    assert plain == [(336, 480), (336, 336)]
