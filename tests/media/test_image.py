"""Whatever holds an image becomes the same upright RGB image, and what can be meant in two ways is refused."""

import base64
import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_image
from PIL import Image

from llava_lite.conversation.images import as_list, group_images
from llava_lite.media.arrays import array_to_image
from llava_lite.media.image import ImageError, fetch, upright_image

IMAGE = draw_image(3)
PIXELS = np.array(IMAGE)
BUFFER = io.BytesIO()
IMAGE.save(BUFFER, "PNG")
DATA = BUFFER.getvalue()
TEXT = base64.b64encode(DATA).decode()

SPELLINGS = {
    "PIL": lambda path: IMAGE,
    "path": lambda path: str(path),
    "pathlib": lambda path: path,
    "file address": lambda path: f"file://{path}",
    "file address with letters escaped": lambda path: f"file://{str(path).replace('image', 'im%61ge')}",
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
    "HWC as views": lambda path: np.array(IMAGE.transpose(Image.Transpose.FLIP_LEFT_RIGHT))[:, ::-1],
    "int64": lambda path: PIXELS.astype(np.int64),
    "floats to 255": lambda path: PIXELS.astype(np.float32),
    "floats to 1": lambda path: PIXELS / 255,
    "float16 to 1": lambda path: (PIXELS / 255).astype(np.float16),
    "tensor CHW": lambda path: torch.from_numpy(PIXELS.transpose(2, 0, 1).copy()),
    "tensor of floats": lambda path: torch.from_numpy(PIXELS / 255).permute(2, 0, 1),
    "tensor with gradient": lambda path: torch.tensor(PIXELS / 255, requires_grad=True),
    "RGBA": lambda path: np.array(IMAGE.convert("RGBA")),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_an_image_is_the_same_image(tmp_path, spelling):
    path = tmp_path / "image.png"
    path.write_bytes(DATA)
    found = upright_image(SPELLINGS[spelling](path))
    assert found.mode == "RGB"
    assert np.array_equal(np.array(found), PIXELS)


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "image.png").write_bytes(DATA)
    for path in ("~/image.png", Path("~/image.png")):
        assert np.array_equal(np.array(upright_image(path)), PIXELS)


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 1), (1, 9, 7)])
def test_gray_pixels_are_an_image_of_three_equal_colours(shape):
    pixels = np.arange(63, dtype=np.uint8).reshape(shape)
    found = np.array(array_to_image(pixels))
    assert found.shape == (9, 7, 3)
    assert all(np.array_equal(found[:, :, i], np.arange(63).reshape(9, 7)) for i in range(3))


def test_bfloat16_pixels_are_read():
    half = torch.full((3, 5, 6), 0.5, dtype=torch.bfloat16)
    assert np.array(array_to_image(half)).max() == 128


FLOATS = np.zeros((5, 6, 3), np.float32)
REFUSED = [
    (np.zeros((3, 8, 3), np.uint8), r"may be \[H, W, C\] or \[C, H, W\]"),
    (np.zeros((8, 8, 2), np.uint8), r"shape \(8, 8, 2\) is not an image"),
    (np.zeros((2, 8, 8, 3), np.uint8), r"one image an array"),
    (np.zeros((0, 8, 3), np.uint8), "is not an image"),
    (np.zeros(8, np.uint8), "is not an image"),
    (np.zeros((8, 8, 3), bool), "array of bool"),
    (np.array([["a"]]), "array of <U1"),
    (FLOATS - 0.5, "from -0.5 to -0.5 has no known scale.*pixel_values"),
    (FLOATS + 2.5, "from 2.5 to 2.5"),
    (FLOATS + 1.001, "has no known scale"),
    (FLOATS + 300, "from 300 to 300"),
    (FLOATS + np.nan, "NaN"),
    (np.full((8, 8, 3), 60_000, np.uint16), "uint16 from 60000"),
    (np.full((8, 8, 3), -1, np.int32), "from -1 to -1"),
]


@pytest.mark.parametrize(("pixels", "output"), REFUSED, ids=lambda value: str(value)[:24])
def test_pixels_that_can_be_meant_in_two_ways_are_refused(pixels, output):
    with pytest.raises(ValueError, match=output):
        array_to_image(pixels)


@pytest.mark.parametrize(
    ("image", "output"),
    [
        (None, "got NoneType"),
        (3, "got int 3"),
        ([IMAGE], "got a list of 1"),
        ({}, "a dict with nothing in it"),
        ({"bytes": None, "path": None}, "a dict with 'bytes', 'path'"),
        ({"image": IMAGE}, "a dict with 'image'"),
        ({"bytes": 3, "path": None}, "'bytes' of an image are bytes"),
        (object(), "got object"),
    ],
)
def test_what_is_no_image_is_named(image, output):
    with pytest.raises(TypeError, match=output):
        upright_image(image)


@pytest.mark.parametrize(
    ("image", "output"),
    [
        ("", "it is not a path"),
        ("a\0b", "it is not a path"),
        ("gone.png", "no such file"),
        ("file:///gone.png", "no such file"),
        ("~/gone.png", "no such file"),
        ("data:image/png;base64,???", "not base64"),
        (b"", "0 bytes"),
        (b"no image", "8 bytes"),
    ],
)
def test_what_cannot_be_read_is_named(image, output):
    with pytest.raises(ImageError, match=output):
        upright_image(image)


def test_a_broken_file_that_pillow_has_opened_is_named(tmp_path):
    (tmp_path / "cut.png").write_bytes(DATA[: len(DATA) // 2])
    with pytest.raises(ImageError, match=r"a PIL image.*cannot be read"):
        upright_image(Image.open(tmp_path / "cut.png"))


def test_images_of_a_text_come_in_any_row():
    stack = np.stack([PIXELS, PIXELS])
    for images in ([IMAGE, IMAGE], (IMAGE, IMAGE), iter([IMAGE, IMAGE]), stack, torch.from_numpy(stack)):
        (group,) = group_images(images, ["<image><image>"])
        assert [np.array_equal(np.array(image), PIXELS) for image in group] == [True, True]
    assert len(as_list(DATA)) == len(as_list("a.png")) == len(as_list(io.BytesIO(DATA))) == len(as_list(PIXELS)) == 1
    assert as_list({"bytes": DATA, "path": None}) == [{"bytes": DATA, "path": None}]


@pytest.fixture
def url_of_image():
    """Return the URL of a local server that answers every request with DATA."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(DATA)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/image.png"
    server.shutdown()
    server.server_close()


def test_a_url_is_read_up_to_a_limit(url_of_image, monkeypatch):
    assert fetch(url_of_image) == DATA
    monkeypatch.setattr("llava_lite.media.image.MAX_DOWNLOAD_BYTES", len(DATA))
    assert fetch(url_of_image) == DATA
    monkeypatch.setattr("llava_lite.media.image.MAX_DOWNLOAD_BYTES", len(DATA) - 1)
    with pytest.raises(ImageError, match=r"image.png': it has more than 0 MiB. Download it and make it smaller"):
        fetch(url_of_image)
