"""An image becomes the pixels that LLaVA's checkpoints were trained on, or an ImageError."""

import base64
import contextlib
import io
import pickle
import struct
import sys
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_lite.media.image import MAX_IMAGE_PIXELS, ImageError, open_image, to_rgb
from llava_lite.media.preprocess import load_image_processor, prepare_image
from llava_lite.mm_utils import expand2square, load_image_from_base64, process_images

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
BACKGROUND = (122, 116, 104)


@pytest.fixture
def clip_processor():
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture
def siglip_processor():
    return SiglipImageProcessorPil(size={"height": 32, "width": 32})


def random_image(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def normalised(image):
    pixels = (np.asarray(image) / 255 - MEAN) / STD
    return torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)


def write_png_header(path, width, height):
    """Write a PNG with a header of its size and hardly a byte of pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )
    return path


def test_square_is_resize_of_the_short_side_and_the_middle(clip_processor):
    image = random_image(80, 40)
    resized = image.resize((64, 32), Image.Resampling.BICUBIC)
    expected = normalised(resized.crop((16, 0, 48, 32)))
    pixels = prepare_image(image, clip_processor, "square")
    assert pixels.dtype == torch.float32
    # float32 in another order of operations.
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "corner"), [((80, 40), (0, 20)), ((40, 81), (20, 0))])
def test_pad_puts_the_full_image_on_a_square_of_the_mean_colour(clip_processor, size, corner):
    image = random_image(*size)
    canvas = np.zeros((max(size), max(size), 3), dtype=np.uint8) + np.array(BACKGROUND, dtype=np.uint8)
    left, top = corner
    canvas[top : top + size[1], left : left + size[0]] = np.asarray(image)
    square = expand2square(image, BACKGROUND)
    assert np.array_equal(np.asarray(square), canvas)
    expected = normalised(Image.fromarray(canvas).resize((32, 32), Image.Resampling.BICUBIC))
    torch.testing.assert_close(prepare_image(image, clip_processor, "pad"), expected, atol=1e-5, rtol=0)


def test_a_grey_image_is_padded_with_one_number_or_three():
    grey = Image.new("L", (4, 2), 200)
    for colour in (9, (9, 9, 9)):
        square = expand2square(grey, colour)
        assert (square.mode, square.size) == ("RGB", (4, 4))
        assert [square.getpixel((0, y)) for y in range(4)] == [(9,) * 3, (200,) * 3, (200,) * 3, (9,) * 3]


def test_a_square_image_needs_no_padding(clip_processor):
    image = random_image(40, 40)
    assert expand2square(image, BACKGROUND) is image
    assert torch.equal(prepare_image(image, clip_processor, "pad"), prepare_image(image, clip_processor))


def test_processors_that_squash_keep_doing_so(siglip_processor):
    image = random_image(80, 40)
    pixels = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) / 255 * 2 - 1
    expected = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)
    torch.testing.assert_close(prepare_image(image, siglip_processor), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (3, 50), (50, 3), (3, 3), (4, 1)])
def test_tiny_images_are_read_with_their_own_colours(clip_processor, size, aspect_ratio):
    pixels = prepare_image(Image.new("RGB", size, (255, 0, 51)), clip_processor, aspect_ratio)
    assert pixels.shape == (3, 32, 32)
    # Where the image stands, in the middle, one colour stays that colour.
    if aspect_ratio == "square" or size[0] == size[1]:
        expected = torch.tensor((np.array([1.0, 0.0, 0.2]) - MEAN) / STD, dtype=torch.float32)
        torch.testing.assert_close(pixels, expected[:, None, None].expand(3, 32, 32), atol=1e-5, rtol=0)


@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
@pytest.mark.parametrize("size", [(1, 60000), (60000, 1)])
def test_a_very_long_image_does_not_fill_the_memory(clip_processor, size, aspect_ratio):
    # Straight to the processor it would be 32 x 1.9 million pixels on the way; on a square, 3.6 thousand millions.
    pixels = prepare_image(Image.new("RGB", size, (255, 0, 51)), clip_processor, aspect_ratio)
    assert pixels.shape == (3, 32, 32)


def test_cutting_the_far_ends_changes_nothing_in_the_middle(clip_processor):
    image = random_image(1000, 10)
    expected = clip_processor(image, return_tensors="pt")["pixel_values"][0]
    # 1000 is cut to 640, which lies on the same grid of the resized image but for the rounding of its length.
    difference = (prepare_image(image, clip_processor) - expected).abs().mean()
    assert difference < 0.02


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "PA", "CMYK", "1", "YCbCr", "HSV", "I", "F", "RGBa"])
@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
def test_every_mode_becomes_rgb(clip_processor, mode, aspect_ratio):
    source = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode, mode)
    image = random_image(20, 10).convert({"LA": "RGBA"}.get(source, source) if source != "LA" else "LA").convert(mode)
    assert image.mode == mode
    assert to_rgb(image).mode == "RGB"
    assert to_rgb(image).size == (20, 10)
    assert prepare_image(image, clip_processor, aspect_ratio).shape == (3, 32, 32)


def test_transparency_is_dropped_and_the_colours_below_it_stay(clip_processor):
    colours = random_image(20, 10)
    see_through = colours.copy()
    see_through.putalpha(0)
    assert np.array_equal(np.asarray(to_rgb(see_through)), np.asarray(colours))
    grey = colours.convert("L")
    see_through = grey.convert("LA")
    see_through.putalpha(0)
    assert np.array_equal(np.asarray(to_rgb(see_through)), np.stack([np.asarray(grey)] * 3, axis=-1))


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_transparent_colour_of_a_png_does_not_turn_white(tmp_path, clip_processor, mode):
    image = Image.new("RGB", (20, 20), (255, 0, 0)).convert(mode)
    transparent = {"P": image.getpixel((0, 0)), "L": image.getpixel((0, 0)), "RGB": (255, 0, 0)}[mode]
    image.save(tmp_path / "red.png", transparency=transparent)
    with Image.open(tmp_path / "red.png") as stored:
        assert "transparency" in stored.info
        expected = normalised(image.convert("RGB").resize((32, 32)))
        torch.testing.assert_close(prepare_image(stored, clip_processor), expected, atol=1e-5, rtol=0)
    opened = open_image(tmp_path / "red.png")
    assert "transparency" not in opened.info
    torch.testing.assert_close(prepare_image(opened, clip_processor), expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("error")
def test_a_palette_with_an_alpha_for_each_colour_keeps_its_colours(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "a.png", transparency=b"\x80\x00")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (10, 20, 30)


def test_sixteen_bits_of_grey_become_eight_and_not_white(tmp_path):
    deep = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    pixels = np.asarray(open_image(tmp_path / "deep.png"))
    assert np.array_equal(pixels[..., 0], deep >> 8)


def test_a_png_called_jpg_is_read(tmp_path):
    image = random_image(8, 6)
    image.save(tmp_path / "a.jpg", format="PNG")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.jpg")), np.asarray(image))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif", "ppm", "jp2"])
def test_the_formats_of_public_data_are_read(tmp_path, suffix):
    random_image(8, 6).save(tmp_path / f"a.{suffix}")
    opened = open_image(tmp_path / f"a.{suffix}")
    assert (opened.mode, opened.size) == ("RGB", (8, 6))


def test_a_bomb_is_refused_from_its_header(tmp_path):
    path = write_png_header(tmp_path / "bomb.png", 12_000, 12_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match="12000 x 12000 = 144 million pixels, more than 89 million") as caught:
            open_image(path)
    assert caught.value.path == str(path)
    with pytest.raises(ImageError, match="bomb"):
        open_image(write_png_header(tmp_path / "larger.png", 60_000, 60_000))


def test_the_largest_cameras_are_below_the_limit(tmp_path):
    # 9504 x 6336 is a 60 megapixel camera: its header passes, so the error is the missing content.
    assert 9504 * 6336 < MAX_IMAGE_PIXELS < 12_000 * 12_000
    with pytest.raises(ImageError, match="OSError"):
        open_image(write_png_header(tmp_path / "camera.png", 9504, 6336))


def test_missing_and_broken_images_are_named_with_their_reason(tmp_path):
    with pytest.raises(ImageError, match=r"cannot use the image '.*none.jpg': there is no such file"):
        open_image(tmp_path / "none.jpg")
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(ImageError, match="UnidentifiedImageError"):
        open_image(tmp_path / "text.jpg")
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ImageError, match="UnidentifiedImageError"):
        open_image(tmp_path / "empty.jpg")
    with pytest.raises(ImageError, match=r"IsADirectoryError|PermissionError"):
        open_image(tmp_path)
    random_image(200, 200).save(tmp_path / "full.jpg")
    content = (tmp_path / "full.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match="truncated"):
        open_image(tmp_path / "half.jpg")


def test_a_format_that_runs_a_program_is_not_read(tmp_path):
    random_image(8, 6).save(tmp_path / "page.eps")
    (tmp_path / "page.jpg").write_bytes((tmp_path / "page.eps").read_bytes())
    with pytest.raises(ImageError, match="UnidentifiedImageError"):
        open_image(tmp_path / "page.jpg")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tif", "bmp"])
def test_random_damage_is_an_image_error_or_an_image(tmp_path, suffix):
    rng = np.random.default_rng(0)
    random_image(30, 20).save(tmp_path / f"a.{suffix}")
    content = np.frombuffer((tmp_path / f"a.{suffix}").read_bytes(), dtype=np.uint8)
    for _ in range(30):
        damaged = content.copy()
        damaged[rng.integers(0, len(damaged), 8)] = rng.integers(0, 256, 8)
        (tmp_path / "damaged").write_bytes(damaged[: rng.integers(1, len(damaged) + 1)].tobytes())
        # Nothing but an ImageError may come out.
        with contextlib.suppress(ImageError):
            assert open_image(tmp_path / "damaged").mode == "RGB"


def test_an_image_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(ImageError("a.jpg", "it is broken.")))
    assert (error.path, error.reason) == ("a.jpg", "it is broken.")
    assert str(error) == "cannot use the image 'a.jpg': it is broken."


def test_exif_turns_an_image_for_people_and_not_in_training(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(tmp_path / "phone.jpg", exif=exif)
    assert open_image(tmp_path / "phone.jpg").size == (40, 20)
    assert open_image(tmp_path / "phone.jpg", upright=True).size == (20, 40)


@pytest.mark.parametrize("aspect_ratio", ["pad", None])
def test_process_images_takes_arrays_and_one_image_as_llavas_processor_does(clip_processor, aspect_ratio):
    config, image = SimpleNamespace(image_aspect_ratio=aspect_ratio), random_image(40, 33)
    wanted = process_images([image], clip_processor, config)
    assert torch.equal(process_images([np.asarray(image)], clip_processor, config), wanted)
    assert torch.equal(process_images(image, clip_processor, config), wanted)
    hf = clip_processor([np.asarray(image)], return_tensors="pt")["pixel_values"]
    assert aspect_ratio == "pad" or torch.equal(wanted, hf.float())


def test_process_images_stacks_as_the_configuration_says(clip_processor):
    images = [random_image(80, 40), random_image(30, 50).convert("L"), random_image(40, 40).convert("RGBA")]
    for aspect_ratio in ("square", "pad"):
        stacked = process_images(images, clip_processor, SimpleNamespace(image_aspect_ratio=aspect_ratio))
        each = [prepare_image(image, clip_processor, aspect_ratio) for image in images]
        assert torch.equal(stacked, torch.stack(each))
    square = process_images(images, clip_processor, SimpleNamespace(image_aspect_ratio="square"))
    assert torch.equal(process_images(images, clip_processor, SimpleNamespace()), square)
    assert torch.equal(process_images(images, clip_processor, SimpleNamespace(image_aspect_ratio=None)), square)
    assert torch.equal(process_images(images, clip_processor, None), square)


@pytest.mark.parametrize("aspect_ratio", ["anyres_max_9", "crop_split"])
def test_an_unknown_aspect_ratio_is_refused_with_the_list(clip_processor, aspect_ratio):
    with pytest.raises(ValueError, match=f"unknown image_aspect_ratio '{aspect_ratio}'; known: square, pad, anyres"):
        process_images([random_image(4, 4)], clip_processor, SimpleNamespace(image_aspect_ratio=aspect_ratio))


def test_base64_text_becomes_an_image():
    image = random_image(8, 6)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    opened = load_image_from_base64(base64.b64encode(buffer.getvalue()).decode())
    assert np.array_equal(np.asarray(opened), np.asarray(image))
    with pytest.raises(ImageError, match="base64 text"):
        load_image_from_base64("a")


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_the_image_processor_of_a_tower_needs_no_torchvision(toy_tower_dir, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    processor = load_image_processor(toy_tower_dir(kind))
    assert prepare_image(random_image(70, 40), processor, "pad").shape == (3, 32, 32)


def test_a_missing_image_processor_is_an_error_that_names_the_place(tmp_path):
    with pytest.raises(OSError, match=str(tmp_path)):
        load_image_processor(tmp_path)
