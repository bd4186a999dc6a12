"""Images are found where records place them, never elsewhere, and known by their bytes."""

import io
import os
import struct
import zlib

import pytest
from PIL import Image

from llava_lite.data.image_files import find_image, inspect_image, safe_path
from llava_lite.media.image import MAX_IMAGE_PIXELS, ImageError


def noise(size=(64, 48), mode="RGB"):
    return Image.frombytes("RGB", size, os.urandom(size[0] * size[1] * 3)).convert(mode)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path):
    directory = tmp_path / "images"
    (directory / "coco").mkdir(parents=True)
    (directory / "coco" / "1.jpg").write_bytes(encoded(noise(), "JPEG"))
    (tmp_path / "secret.jpg").write_bytes(encoded(noise(), "JPEG"))
    return directory


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
    with pytest.raises(ImageError):
        find_image(str(root), name.format(absolute=root.parent / "secret.jpg"))


def test_an_absolute_path_below_the_image_folder_is_taken_relative_to_it(root, tmp_path):
    inside = str(root / "coco" / "1.jpg")
    assert find_image(str(root), inside) == (inside, False)
    assert find_image(f"{tmp_path}/images/", inside) == (inside, False)
    assert find_image("/", inside) == (inside, False)
    # OCR-VQA's other suffixes are looked for there too.
    (root / "coco" / "2.png").write_bytes(encoded(noise(), "PNG"))
    assert find_image("/", str(root / "coco" / "2.jpg")) == (str(root / "coco" / "2.png"), True)
    with pytest.raises(ImageError, match=r"leaves the image folder .*: --image_folder /\."):
        find_image(str(root), str(tmp_path / "secret.jpg"))
    with pytest.raises(ImageError, match="leaves the image folder"):
        find_image(str(root), f"{root}/../secret.jpg")
    with pytest.raises(ImageError, match="--image_folder / for absolute paths"):
        find_image(None, inside)


def test_links_that_the_user_made_may_be_allowed(root):
    (root / "linked").symlink_to(root.parent)
    with pytest.raises(ImageError, match="--follow_links True"):
        find_image(str(root), "linked/secret.jpg")
    assert find_image(str(root), "linked/secret.jpg", follow_links=True)[1] is False
    with pytest.raises(ImageError):
        find_image(str(root), "../secret.jpg", follow_links=True)


def test_links_within_the_directory_and_a_linked_directory_itself_are_fine(root, tmp_path):
    (root / "inside.jpg").symlink_to(root / "coco" / "1.jpg")
    (tmp_path / "other").symlink_to(root)
    assert find_image(str(root), "inside.jpg") == (str(root / "inside.jpg"), False)
    assert find_image(str(tmp_path / "other"), "coco/1.jpg")[0] == str(tmp_path / "other" / "coco" / "1.jpg")
    assert safe_path(str(root), "a..b/c.jpg") == str(root / "a..b" / "c.jpg")


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_a_missing_jpg_is_found_under_another_suffix(root, suffix):
    (root / f"book{suffix}").write_bytes(encoded(noise(), suffix[1:].upper()))
    assert find_image(str(root), "book.jpg") == (str(root / f"book{suffix}"), True)


def test_a_missing_image_and_a_missing_directory_are_named(root):
    with pytest.raises(ImageError, match="there is no such file"):
        find_image(str(root), "coco/missing.jpg")
    with pytest.raises(ImageError, match="--image_folder"):
        find_image(None, "coco/1.jpg")


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
def test_the_size_of_a_complete_image_is_read_whatever_its_name(root, kind, mode, size):
    path = root / "any.jpg"
    path.write_bytes(encoded(noise(size, mode), kind))
    assert inspect_image(str(path)) == size
    assert inspect_image(str(path), decode=True) == size


@pytest.mark.parametrize(("kind", "mode"), FORMATS)
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.95])
def test_an_image_cut_short_is_found_without_decoding_all_others(root, kind, mode, fraction):
    data = encoded(noise((256, 256), mode), kind)
    path = root / "cut.jpg"
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(ImageError):
        inspect_image(str(path))


def test_a_gif_cut_behind_a_byte_that_looks_like_its_end_is_found(root):
    data = encoded(noise((256, 256), "P"), "GIF")
    path = root / "cut.gif"
    path.write_bytes(data[: data.index(b";", len(data) // 2) + 1])
    with pytest.raises(ImageError):
        inspect_image(str(path))


def test_bytes_after_the_end_of_an_image_are_ignored(root):
    for extra in (b"\x00" * 100, b"trailer" * 2000):
        path = root / "tail.jpg"
        path.write_bytes(encoded(noise(), "JPEG") + extra)
        assert inspect_image(str(path)) == (64, 48)


@pytest.mark.parametrize("data", [b"", b"<html>404 Not Found</html>", b"\xff\xd8\xff\xe0", b"GIF89a"])
def test_what_is_no_image_is_refused(root, data):
    path = root / "bad.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError):
        inspect_image(str(path))


def test_a_bomb_is_refused_from_its_header(root):
    side = int(MAX_IMAGE_PIXELS**0.5) + 1
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path = root / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(ImageError, match="million pixels"):
        inspect_image(str(path))


def test_only_decoding_finds_an_image_that_is_broken_in_its_middle(root):
    data = bytearray(encoded(noise((256, 256)), "PNG"))
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    path = root / "middle.png"
    path.write_bytes(data)
    assert inspect_image(str(path)) == (256, 256)
    with pytest.raises(ImageError):
        inspect_image(str(path), decode=True)
