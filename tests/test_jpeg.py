"""A JPEG decoded by another library has Pillow's bytes, or Pillow decodes it."""

import io
import sys
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from llava_lite.jpeg import find_decoder, plain_size, read_jpeg
from llava_lite.pictures import PictureError, open_picture

LIMIT = 10**8


def noise(size=(45, 31), mode="RGB"):
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(picture=None, **options):
    buffer = io.BytesIO()
    (picture or noise()).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def by_pillow(data):
    with Image.open(io.BytesIO(data)) as picture:
        return np.array(picture.convert("RGB"))


class Stranger:
    """A library that decodes as Pillow does, remembers what it was given, and may be off by `error`."""

    def __init__(self, error=0):
        self.error = error
        self.seen = []

    def decode_jpeg(self, data, **options):
        self.seen.append(data)
        return (by_pillow(data) + self.error).astype(np.uint8)


@pytest.fixture
def library(monkeypatch):
    """Return a function: install a library under the name of simplejpeg."""

    def install(stranger):
        module = ModuleType("simplejpeg")
        module.decode_jpeg = stranger.decode_jpeg
        monkeypatch.setitem(sys.modules, "simplejpeg", module)
        find_decoder.cache_clear()
        return stranger

    yield install
    find_decoder.cache_clear()


PLAIN = [{"quality": q, "subsampling": s, "optimize": o} for q in (30, 95) for s in (0, 1, 2) for o in (False, True)]


@pytest.mark.parametrize("options", [*PLAIN, {"restart_marker_rows": 1}, {"exif": b"Exif\0\0" + bytes(40)}])
def test_plain_files_have_pillows_bytes(library, tmp_path, options):
    stranger = library(Stranger())
    data = encoded(**options)
    (tmp_path / "a.jpg").write_bytes(data)
    assert find_decoder() == stranger.decode_jpeg
    assert plain_size(data) == (45, 31)
    for source in (tmp_path / "a.jpg", io.BytesIO(data)):
        stranger.seen.clear()
        assert np.array_equal(np.asarray(open_picture(source)), by_pillow(data))
        assert len(stranger.seen) == 1


def adobe_rgb():
    """Return a file whose Adobe mark says that its three components are red, green and blue."""
    data = encoded()
    return data[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00" + data[2:]


OTHERS = {
    "progressive": encoded(progressive=True),
    "grey": encoded(noise(mode="L")),
    "CMYK": encoded(noise(mode="CMYK")),
    "red, green and blue": adobe_rgb(),
    "4:1:1": encoded(subsampling="4:2:0").replace(b"\x01\x22\x00\x02\x11", b"\x01\x41\x00\x02\x11"),
    "a PNG": b"\x89PNG\r\n",
    "nothing": b"",
    "two bytes": b"\xff\xd8",
    "cut in the header": encoded()[:100],
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_plain_is_left_to_pillow(library, name):
    stranger = library(Stranger())
    find_decoder()
    stranger.seen.clear()
    assert plain_size(OTHERS[name]) is None
    assert read_jpeg(io.BytesIO(OTHERS[name]), LIMIT) is None
    assert stranger.seen == []


def test_a_library_whose_bytes_differ_is_not_used(library):
    library(Stranger(error=1))
    assert find_decoder() is None
    assert read_jpeg(io.BytesIO(encoded()), LIMIT) is None


def test_a_library_that_only_warns_of_cut_files_is_not_looked_for(library, monkeypatch):
    module = ModuleType("turbojpeg")
    module.TJPF_RGB, module.TurboJPEG = 0, lambda: pytest.fail("PyTurboJPEG was opened")
    monkeypatch.setitem(sys.modules, "turbojpeg", module)
    library(Stranger(error=1))
    assert find_decoder() is None


def test_without_a_library_pillow_reads(library, monkeypatch):
    library(Stranger())
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert find_decoder() is None
    assert np.array_equal(np.asarray(open_picture(io.BytesIO(encoded()))), by_pillow(encoded()))


def test_a_large_picture_is_not_decoded_before_it_is_refused(library):
    stranger = library(Stranger())
    find_decoder()
    stranger.seen.clear()
    assert read_jpeg(io.BytesIO(encoded()), 45 * 31 - 1) is None
    assert stranger.seen == []


def test_a_broken_file_is_pillows_to_judge(library, tmp_path):
    library(Stranger())
    (tmp_path / "cut.jpg").write_bytes(encoded()[:-200])
    with pytest.raises(PictureError, match="truncated"):
        open_picture(tmp_path / "cut.jpg")
    with pytest.raises(PictureError, match="there is no such file"):
        open_picture(tmp_path / "none.jpg")


@pytest.mark.skipif("find_decoder() is None", reason="simplejpeg is not installed")
def test_the_installed_library_has_pillows_bytes():
    random = np.random.default_rng(1)
    for number in range(60):
        size = tuple(random.integers(1, 130, 2).tolist())
        data = encoded(noise(size), quality=int(random.integers(5, 100)), subsampling=number % 3)
        assert np.array_equal(read_jpeg(io.BytesIO(data), LIMIT), by_pillow(data))
    broken = np.frombuffer(encoded(noise((90, 80)), quality=90), np.uint8)
    for _ in range(60):
        damaged = broken.copy()
        damaged[random.integers(300, len(damaged), 3)] = random.integers(0, 256, 3)
        made = read_jpeg(io.BytesIO(damaged.tobytes()), LIMIT)
        if made is not None:
            assert np.array_equal(made, by_pillow(damaged.tobytes()))
