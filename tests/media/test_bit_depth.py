"""Images of more than 8 bits a pixel keep black black and white white: nothing is clipped, nothing is left dark."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from llava_lite.data.image_files import inspect_image
from llava_lite.media.image import ImageError, open_image, to_rgb, upright_image

RAMP = np.linspace(0, 1, 80)[None].repeat(6, 0)
GRAY = np.floor(RAMP * 255.999).astype(np.uint8)


def save(array, suffix="TIFF"):
    """Return an array as the bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, suffix)
    return file.getvalue()


def tiff(array, bits, sample_format=1, photometric=1):
    """Return an uncompressed little-endian TIFF, tag by tag: Pillow writes neither signed nor unsigned 32 bits."""
    data, (width, height) = array.tobytes(), RAMP.T.shape
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 4, height), (279, 4, len(data)), (339, 3, sample_format)]
    entries = b"".join(struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def seen(data):
    """Return the gray levels [H, W] of the image as the model sees it, in training and in a call."""
    pixels = np.asarray(open_image(io.BytesIO(data)))
    with Image.open(io.BytesIO(data)) as image:
        asked = [upright_image(one) for one in (data, image)]
    assert all((np.asarray(one) == pixels).all() for one in asked)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


FILES = {
    "uint16 tif": save((RAMP * 65535).astype("u2")),
    "uint16 tif, big-endian": save((RAMP * 65535).astype(">u2")),
    "uint16 png": save((RAMP * 65535).astype("u2"), "PNG"),
    "uint16 pgm": save((RAMP * 65535).astype("u2"), "PPM"),
    "uint16 jp2": save((RAMP * 65535).astype("u2"), "JPEG2000"),
    "int32 tif 0..255": save((RAMP * 255).astype("i4")),
    "int32 tif 0..65535": save((RAMP * 65535).astype("i4")),
    "int32 tif 0..2^31": tiff((RAMP * (2**31 - 1)).astype("<i4"), 32, 2),
    "int32 tif -1000..1000": save((RAMP * 2000 - 1000).astype("i4")),
    "uint32 tif 0..2^32": tiff((RAMP * (2**32 - 1)).astype("<u4"), 32, 1),
    "int16 tif -1000..1000": tiff((RAMP * 2000 - 1000).astype("<i2"), 16, 2),
    "float tif 0..1": save(RAMP.astype("f4")),
    "float tif 0..255": save((RAMP * 255).astype("f4")),
    "float tif 0..65535": save((RAMP * 65535).astype("f4")),
    "float tif 0..1e9": save((RAMP * 1e9).astype("f4")),
    "float tif -1000..1000": save((RAMP * 2000 - 1000).astype("f4")),
    "float tif -1e-3..1e-3": save((RAMP * 2e-3 - 1e-3).astype("f4")),
}


@pytest.mark.parametrize("name", FILES)
def test_a_ramp_from_black_to_white_is_one(name):
    levels = seen(FILES[name]).astype(int)
    assert (levels[0, 0], levels[0, -1]) == (0, 255)
    # A level more or less: one rounds, another cuts.
    assert np.abs(levels - GRAY).max() <= 1
    assert inspect_image(FILES[name]) == (80, 6)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        # By the range of the type, or the first that holds all numbers: half of it is half of white.
        (np.full((4, 4), 32768, "u2"), 128),
        (np.full((4, 4), 100, "i4"), 100),
        (np.full((4, 4), 32768, "i4"), 128),
        (np.full((4, 4), 0.5, "f4"), 128),
        (np.full((4, 4), 100, "f4"), 100),
        (np.full((4, 4), 32768, "f4"), 128),
        # Of equal numbers without a known range nobody knows how bright they are.
        (np.full((4, 4), -5, "i4"), 0),
        (np.full((4, 4), 1e9, "f4"), 0),
    ],
)
def test_a_flat_image_has_the_brightness_of_its_range(array, expected):
    assert np.unique(seen(save(array))).tolist() == [expected]


def test_twelve_bits_are_scaled_where_the_file_says_so():
    twelve = (RAMP * 4095).astype("u2")
    # Stored in 16 bits without a word, they are dark numbers of 16 bits.
    assert seen(save(twelve)).max() == 15
    packed = twelve.reshape(-1, 2).astype(int)
    data = np.stack([packed[:, 0] >> 4, (packed[:, 0] & 15) << 4 | packed[:, 1] >> 8, packed[:, 1] & 255], 1)
    file = tiff(data.astype(np.uint8).reshape(6, 120), 12)
    assert np.abs(seen(file).astype(int) - GRAY).max() <= 1


@pytest.mark.parametrize("kind", ["u2", "f4"])
def test_a_tiff_whose_zero_is_white_is_inverted(kind):
    bits, sample_format = (16, 1) if kind == "u2" else (32, 3)
    array = (RAMP * (65535 if kind == "u2" else 1)).astype(f"<{kind}")
    levels = seen(tiff(array, bits, sample_format, photometric=0)).astype(int)
    assert np.abs(levels - (255 - GRAY)).max() <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_without_a_range_are_refused_with_the_reason(value, tmp_path):
    array = RAMP.astype("f4")
    array[2, 3] = value
    (tmp_path / "depth.tif").write_bytes(save(array))
    for opened in (open_image, inspect_image):
        with pytest.raises(ImageError, match="1 of its 480 pixels are not finite") as error:
            opened(str(tmp_path / "depth.tif"))
    assert "depth.tif" in str(error.value)
    assert "UnfitPixels" not in str(error.value)


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_an_image_in_memory_is_scaled_as_a_file_is(mode):
    array = (RAMP * 65535).astype({"I": "i4", "F": "f4", "I;16": "u2"}[mode])
    image = Image.fromarray(array)
    assert image.mode == mode
    assert np.abs(np.asarray(to_rgb(image))[..., 0].astype(int) - GRAY).max() <= 1


# The modes that each format can hold.
MODES = {"PNG": "1 L LA P RGBA", "TIFF": "1 L LA P RGBA CMYK", "JPEG": "1 L CMYK"}


@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix in MODES for mode in MODES[suffix].split()])
def test_other_modes_keep_black_and_white(mode, suffix):
    file = io.BytesIO()
    source = Image.fromarray(np.array([[0] * 40 + [255] * 40] * 40, np.uint8))
    source.convert("RGB" if mode == "CMYK" else source.mode).convert(mode).save(file, suffix)
    levels = seen(file.getvalue())
    assert (levels[20, 5], levels[20, -5]) == (0, 255)


@pytest.mark.parametrize("suffix", ["GIF", "TIFF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_and_the_first_page_of_several_is_read(suffix):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    file = io.BytesIO()
    lossless = {"lossless": True} if suffix == "WEBP" else {}
    frames[0].save(file, suffix, save_all=True, append_images=frames[1:], **lossless)
    assert open_image(io.BytesIO(file.getvalue())).getpixel((5, 5)) == (255, 0, 0)
    assert inspect_image(file.getvalue()) == (20, 10)
