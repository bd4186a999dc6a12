"""Whatever holds an image becomes the same upright RGB image, and what can be meant in two ways is refused."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_picture
from PIL import Image

from llava_lite.image_inputs import as_list, image_of_array, pictures_of_each, upright_picture
from llava_lite.mm_utils import PictureError

PICTURE = draw_picture(3)
PIXELS = np.array(PICTURE)
BUFFER = io.BytesIO()
PICTURE.save(BUFFER, "PNG")
DATA = BUFFER.getvalue()
TEXT = base64.b64encode(DATA).decode()

SPELLINGS = {
    "PIL": lambda path: PICTURE,
    "path": lambda path: str(path),
    "pathlib": lambda path: path,
    "file address": lambda path: f"file://{path}",
    "file address with letters escaped": lambda path: f"file://{str(path).replace('picture', 'pi%63ture')}",
    "bytes": lambda path: DATA,
    "bytearray": lambda path: bytearray(DATA),
    "memoryview": lambda path: memoryview(DATA),
    "open file": lambda path: io.BytesIO(DATA),
    "data address": lambda path: f"data:image/png;base64,{TEXT}",
    "base64": lambda path: TEXT,
    "datasets, bytes": lambda path: {"bytes": DATA, "path": None},
    "datasets, bytes and a name": lambda path: {"bytes": DATA, "path": "gone.png"},
    "datasets, path": lambda path: {"bytes": None, "path": str(path)},
    "HWC": lambda path: PIXELS,
    "CHW": lambda path: PIXELS.transpose(2, 0, 1),
    "HWC as views": lambda path: np.array(PICTURE.transpose(Image.Transpose.FLIP_LEFT_RIGHT))[:, ::-1],
    "int64": lambda path: PIXELS.astype(np.int64),
    "floats to 255": lambda path: PIXELS.astype(np.float32),
    "floats to 1": lambda path: PIXELS / 255,
    "float16 to 1": lambda path: (PIXELS / 255).astype(np.float16),
    "tensor CHW": lambda path: torch.from_numpy(PIXELS.transpose(2, 0, 1).copy()),
    "tensor of floats": lambda path: torch.from_numpy(PIXELS / 255).permute(2, 0, 1),
    "tensor with gradient": lambda path: torch.tensor(PIXELS / 255, requires_grad=True),
    "RGBA": lambda path: np.array(PICTURE.convert("RGBA")),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_an_image_is_the_same_image(tmp_path, spelling):
    path = tmp_path / "picture.png"
    path.write_bytes(DATA)
    found = upright_picture(SPELLINGS[spelling](path))
    assert found.mode == "RGB"
    assert np.array_equal(np.array(found), PIXELS)


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "picture.png").write_bytes(DATA)
    for path in ("~/picture.png", Path("~/picture.png")):
        assert np.array_equal(np.array(upright_picture(path)), PIXELS)


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 1), (1, 9, 7)])
def test_gray_pixels_are_an_image_of_three_equal_colours(shape):
    pixels = np.arange(63, dtype=np.uint8).reshape(shape)
    found = np.array(image_of_array(pixels))
    assert found.shape == (9, 7, 3)
    assert all(np.array_equal(found[:, :, i], np.arange(63).reshape(9, 7)) for i in range(3))


def test_bfloat16_pixels_are_read():
    half = torch.full((3, 5, 6), 0.5, dtype=torch.bfloat16)
    assert np.array(image_of_array(half)).max() == 128


FLOATS = np.zeros((5, 6, 3), np.float32)
REFUSED = [
    (np.zeros((3, 8, 3), np.uint8), r"\[H, W, C\] or as \[C, H, W\]"),
    (np.zeros((8, 8, 2), np.uint8), r"shape \(8, 8, 2\) is no image"),
    (np.zeros((2, 8, 8, 3), np.uint8), r"one image an array"),
    (np.zeros((0, 8, 3), np.uint8), "is no image"),
    (np.zeros(8, np.uint8), "is no image"),
    (np.zeros((8, 8, 3), bool), "array of bool"),
    (np.array([["a"]]), "array of <U1"),
    (FLOATS - 0.5, "from -0.5 to -0.5 can be meant in several ways.*pixel_values"),
    (FLOATS + 2.5, "from 2.5 to 2.5"),
    (FLOATS + 1.001, "can be meant in several ways"),
    (FLOATS + 300, "from 300 to 300"),
    (FLOATS + np.nan, "NaN"),
    (np.full((8, 8, 3), 60_000, np.uint16), "uint16 from 60000"),
    (np.full((8, 8, 3), -1, np.int32), "from -1 to -1"),
]


@pytest.mark.parametrize(("pixels", "said"), REFUSED, ids=lambda value: str(value)[:24])
def test_pixels_that_can_be_meant_in_two_ways_are_refused(pixels, said):
    with pytest.raises(ValueError, match=said):
        image_of_array(pixels)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (None, "got NoneType"),
        (3, "got int 3"),
        ([PICTURE], "got a list of 1"),
        ({}, "a dict with nothing in it"),
        ({"bytes": None, "path": None}, "a dict with 'bytes', 'path'"),
        ({"image": PICTURE}, "a dict with 'image'"),
        ({"bytes": 3, "path": None}, "'bytes' of an image are bytes"),
        (object(), "got object"),
    ],
)
def test_what_is_no_image_is_named(image, said):
    with pytest.raises(TypeError, match=said):
        upright_picture(image)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("", "it is no path"),
        ("a\0b", "it is no path"),
        ("gone.png", "no such file"),
        ("file:///gone.png", "no such file"),
        ("~/gone.png", "no such file"),
        ("data:image/png;base64,???", "no base64"),
        (b"", "0 bytes"),
        (b"no image", "8 bytes"),
    ],
)
def test_what_cannot_be_read_is_named(image, said):
    with pytest.raises(PictureError, match=said):
        upright_picture(image)


def test_a_broken_file_that_pillow_has_opened_is_named(tmp_path):
    (tmp_path / "cut.png").write_bytes(DATA[: len(DATA) // 2])
    with pytest.raises(PictureError, match=r"a PIL image.*cannot be read"):
        upright_picture(Image.open(tmp_path / "cut.png"))


def test_images_of_a_text_come_in_any_row():
    stack = np.stack([PIXELS, PIXELS])
    for images in ([PICTURE, PICTURE], (PICTURE, PICTURE), iter([PICTURE, PICTURE]), stack, torch.from_numpy(stack)):
        (group,) = pictures_of_each(images, ["<image><image>"])
        assert [np.array_equal(np.array(image), PIXELS) for image in group] == [True, True]
    assert len(as_list(DATA)) == len(as_list("a.png")) == len(as_list(io.BytesIO(DATA))) == len(as_list(PIXELS)) == 1
    assert as_list({"bytes": DATA, "path": None}) == [{"bytes": DATA, "path": None}]
