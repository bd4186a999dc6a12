"""Pictures are found where records say, never elsewhere, and known by their bytes."""

import io
import os
import struct
import zlib

import pytest
from PIL import Image

from llava_lite.data.picture_files import find_picture, inspect_picture, safe_path
from llava_lite.pictures import MAX_PICTURE_PIXELS, PictureError


def noise(size=(64, 48), mode="RGB"):
    return Image.frombytes("RGB", size, os.urandom(size[0] * size[1] * 3)).convert(mode)


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    (folder / "coco").mkdir(parents=True)
    (folder / "coco" / "1.jpg").write_bytes(encoded(noise(), "JPEG"))
    (tmp_path / "secret.jpg").write_bytes(encoded(noise(), "JPEG"))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "../secret.jpg",
        "coco/../../secret.jpg",
        "{absolute}",
        "coco\\..\\..\\secret.jpg",
        "C:/secret.jpg",
        "\\\\server\\share\\secret.jpg",
        "//server/share/secret.jpg",
        "coco/1.jpg\x00.png",
        "file:///etc/passwd",
        "https://example.com/1.jpg",
        "link.jpg",
        "linked/secret.jpg",
    ],
)
def test_no_path_leaves_the_image_folder(root, name):
    (root / "link.jpg").symlink_to(root.parent / "secret.jpg")
    (root / "linked").symlink_to(root.parent)
    with pytest.raises(PictureError):
        find_picture(str(root), name.format(absolute=root.parent / "secret.jpg"))


def test_links_that_the_user_made_may_be_allowed(root):
    (root / "linked").symlink_to(root.parent)
    with pytest.raises(PictureError, match="--follow_links True"):
        find_picture(str(root), "linked/secret.jpg")
    assert find_picture(str(root), "linked/secret.jpg", follow_links=True)[1] is False
    with pytest.raises(PictureError):
        find_picture(str(root), "../secret.jpg", follow_links=True)


def test_links_within_the_folder_and_a_linked_folder_itself_are_fine(root, tmp_path):
    (root / "inside.jpg").symlink_to(root / "coco" / "1.jpg")
    (tmp_path / "other").symlink_to(root)
    assert find_picture(str(root), "inside.jpg") == (str(root / "inside.jpg"), False)
    assert find_picture(str(tmp_path / "other"), "coco/1.jpg")[0] == str(tmp_path / "other" / "coco" / "1.jpg")
    assert safe_path(str(root), "a..b/c.jpg") == str(root / "a..b" / "c.jpg")


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_a_missing_jpg_is_found_under_another_suffix(root, suffix):
    (root / f"book{suffix}").write_bytes(encoded(noise(), suffix[1:].upper()))
    assert find_picture(str(root), "book.jpg") == (str(root / f"book{suffix}"), True)


def test_a_missing_picture_and_a_missing_folder_are_named(root):
    with pytest.raises(PictureError, match="there is no such file"):
        find_picture(str(root), "coco/missing.jpg")
    with pytest.raises(PictureError, match="--image_folder"):
        find_picture(None, "coco/1.jpg")


FORMATS = [
    ("JPEG", "RGB"),
    ("JPEG", "CMYK"),
    ("JPEG", "L"),
    ("PNG", "RGB"),
    ("PNG", "P"),
    ("GIF", "P"),
    ("WEBP", "RGB"),
]
FORMATS += [("BMP", "RGB"), ("TIFF", "RGB"), ("PNG", "1"), ("PNG", "LA")]


@pytest.mark.parametrize(("kind", "mode"), FORMATS)
@pytest.mark.parametrize("size", [(64, 48), (1, 1), (1, 200)])
def test_a_whole_picture_tells_its_size_whatever_its_name(root, kind, mode, size):
    path = root / "any.jpg"
    path.write_bytes(encoded(noise(size, mode), kind))
    assert inspect_picture(str(path)) == size
    assert inspect_picture(str(path), decode=True) == size


@pytest.mark.parametrize(("kind", "mode"), FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_a_picture_cut_short_is_found_without_decoding_all_others(root, kind, mode, share):
    data = encoded(noise((256, 256), mode), kind)
    path = root / "cut.jpg"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(PictureError):
        inspect_picture(str(path))


def test_a_gif_cut_behind_a_byte_that_looks_like_its_end_is_found(root):
    data = encoded(noise((256, 256), "P"), "GIF")
    path = root / "cut.gif"
    path.write_bytes(data[: data.index(b";", len(data) // 2) + 1])
    with pytest.raises(PictureError):
        inspect_picture(str(path))


def test_bytes_behind_the_end_mark_do_no_harm(root):
    for extra in (b"\x00" * 100, b"trailer" * 2000):
        path = root / "tail.jpg"
        path.write_bytes(encoded(noise(), "JPEG") + extra)
        assert inspect_picture(str(path)) == (64, 48)


@pytest.mark.parametrize("data", [b"", b"<html>404 Not Found</html>", b"\xff\xd8\xff\xe0", b"GIF89a"])
def test_what_is_no_picture_is_refused(root, data):
    path = root / "bad.jpg"
    path.write_bytes(data)
    with pytest.raises(PictureError):
        inspect_picture(str(path))


def test_a_bomb_is_refused_from_its_header(root):
    side = int(MAX_PICTURE_PIXELS**0.5) + 1
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path = root / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(PictureError, match="million pixels"):
        inspect_picture(str(path))


def test_only_decoding_finds_a_picture_that_is_broken_in_its_middle(root):
    data = bytearray(encoded(noise((256, 256)), "PNG"))
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    path = root / "middle.png"
    path.write_bytes(data)
    assert inspect_picture(str(path)) == (256, 256)
    with pytest.raises(PictureError):
        inspect_picture(str(path), decode=True)
