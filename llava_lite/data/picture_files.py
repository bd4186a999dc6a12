"""Find a record's picture below the image folder, and tell from head and tail whether it is one.

Paths in data are not trusted: none leaves the folder. What a file is, its bytes say, not its name. A picture that the
record itself holds, as bytes, is looked at in the same way.
"""

import io
import os
import re
from functools import lru_cache
from typing import NamedTuple

from PIL import Image

from llava_lite.bit_depth import CHECKED_MODES
from llava_lite.pictures import MAX_PICTURE_PIXELS, PICTURE_FORMATS, PictureError, open_picture

# OCR-VQA was published as links to .jpg, .png and .gif; LLaVA's annotations call them all .jpg.
OTHER_SUFFIXES = (".jpg", ".png", ".gif", ".jpeg", ".JPG", ".PNG")
# Cameras and editors leave a few bytes behind the end mark.
TAIL_BYTES = 4096
# GIF ends in one byte, which one cut in 256 ends in by chance: it is decoded.
_END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


class PictureFile(NamedTuple):
    """A picture on disk: its size in pixels, and whether it was found under another suffix than the record says."""

    path: str
    width: int
    height: int
    has_other_suffix: bool


@lru_cache(maxsize=65536)
def _real_folder(path: str) -> str:
    return os.path.realpath(path)


def safe_path(image_folder: str, name: str, follow_links: bool = False) -> str:
    """Return the path of a record's picture; PictureError if it would leave the image folder.

    Refused: absolute paths, `..`, backslashes, NUL, URLs, and links that lead out (unless follow_links).
    """
    if "\x00" in name or "\\" in name:
        raise PictureError(name, "the path holds a NUL or a backslash; write it with forward slashes.")
    if "://" in name:
        raise PictureError(name, "it is a URL; pictures are read from the image folder only. Download it first.")
    if name.startswith("/") or name[1:2] == ":" or ".." in name.split("/"):
        reason = f"the path leaves the image folder {image_folder}; write it relative to that, without '..'."
        raise PictureError(name, reason)
    path = os.path.join(image_folder, name)
    if not follow_links:
        root = _real_folder(image_folder)
        real = os.path.join(_real_folder(os.path.dirname(path)), os.path.basename(path))
        if os.path.islink(real):
            real = os.path.realpath(real)
        if os.path.commonpath([root, real]) != root:
            reason = f"a link leads out of the image folder to {real}. If you made it, allow it: --follow_links True."
            raise PictureError(path, reason)
    return path


def find_picture(image_folder: str | None, name: str, follow_links: bool = False) -> tuple[str, bool]:
    """Return the path of a record's picture, and whether it has another suffix than `name` says.

    Raises PictureError if there is none, or if it lies outside.
    """
    if image_folder is None:
        raise PictureError(name, "no image folder is given; name it with --image_folder.")
    path = safe_path(image_folder, name, follow_links)
    if os.path.isfile(path):
        return path, False
    stem, suffix = os.path.splitext(name)
    for other in OTHER_SUFFIXES:
        if other != suffix and os.path.isfile(os.path.join(image_folder, stem + other)):
            return safe_path(image_folder, stem + other, follow_links), True
    raise PictureError(path, "there is no such file.")


def open_image(source: str | bytes, name: str = "in the record"):
    """Return the image of a path, or of the bytes of a file, as open_picture does; `name` stands for the bytes."""
    if not isinstance(source, bytes):
        return open_picture(source)
    try:
        return open_picture(io.BytesIO(source))
    except PictureError as error:
        # Without the address of the bytes in memory, which Pillow has no other name for.
        raise PictureError(name, re.sub(r" <_io\.BytesIO [^>]*>", "", error.reason)) from error


def inspect_picture(source: str | bytes, decode: bool = False) -> tuple[int, int]:
    """Return width and height from the header; PictureError if the file is no picture, a bomb, or cut short.

    source: a path, or the bytes of a file. One whose tail holds its format's end mark counts as whole; any other is
    decoded to see, as is one of a pixel format that may be refused. decode: always decode.
    """
    try:
        # A decompression bomb is refused by our own limit, with our own words, before anything is decoded.
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=PICTURE_FORMATS) as picture:
            (width, height), kind, mode = picture.size, picture.format, picture.mode
    except Exception:
        # open_image finds the same fault and words it; if it finds none, the file has changed in between.
        width, height = open_image(source).size
        return width, height
    if width * height > MAX_PICTURE_PIXELS or decode or mode in CHECKED_MODES or not _has_end(source, kind):
        open_image(source)
    return width, height


def _has_end(source: str | bytes, kind: str) -> bool:
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if kind == "WEBP":
            file.seek(4)
            return int.from_bytes(file.read(4), "little") + 8 <= size
        if kind not in _END_MARKS:
            return False
        file.seek(max(0, size - TAIL_BYTES))
        tail = file.read()
    return _END_MARKS[kind] in tail


class PictureMeter:
    """Record -> width, height and 0 or 1 for another suffix, of each picture: the measure of the table of pictures."""

    def __init__(self, decode: bool = False, follow_links: bool = False):
        self.decode = decode
        self.follow_links = follow_links

    def __call__(self, record) -> tuple[int, ...]:
        """Return 3 numbers a picture; PictureError for the first that cannot be used."""
        numbers = []
        for image in record.images:
            source, has_other_suffix = image, False
            if isinstance(image, str):
                source, has_other_suffix = find_picture(record.image_folder, image, self.follow_links)
            numbers += [*inspect_picture(source, self.decode), int(has_other_suffix)]
        return tuple(numbers)
