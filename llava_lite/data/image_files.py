"""Find a record's image below the image folder, and check it by its header and its end.

Paths in data are not trusted: none may leave the image folder. The format of a file is that of its bytes, not of its
name. An image that the record itself holds, as bytes, is checked in the same way.
"""

import io
import os
import re
import stat
from functools import lru_cache

from PIL import Image

from llava_lite.media.bit_depth import CHECKED_MODES
from llava_lite.media.image import IMAGE_FORMATS, MAX_IMAGE_PIXELS, ImageError, open_image
from llava_lite.output_file import can_be_named

# OCR-VQA was published as links to .jpg, .png and .gif; LLaVA's annotations call them all .jpg.
OTHER_SUFFIXES = (".jpg", ".png", ".gif", ".jpeg", ".JPG", ".PNG")
# Cameras and editors append a few bytes after the end of the image.
TAIL_BYTES = 4096
# A GIF ends with a single byte, which one truncated file in 256 has by chance: GIF files are decoded.
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


@lru_cache(maxsize=65536)
def _real_path(path: str) -> str:
    return os.path.realpath(path)


def safe_path(image_folder: str, name: str, follow_links: bool = False) -> str:
    """Return the path of a record's image; ImageError if it would leave the image folder.

    An absolute path below the image folder is taken relative to it. Not allowed: any other absolute path, `..`,
    backslashes, NUL, URLs, and links that lead outside (unless follow_links).
    """
    if "\x00" in name or "\\" in name:
        raise ImageError(name, "the path holds a NUL or a backslash; write it with forward slashes.")
    if not can_be_named(name):
        raise ImageError(name, "no file can have this name.")
    if "://" in name:
        raise ImageError(name, "it is a URL; images are read from the image folder only. Download it first.")
    name = _relative(name, image_folder)
    if name.startswith("/"):
        reason = (
            f"the path leaves the image folder {image_folder}; write it relative to that, or name a directory above "
            "it, or all of the disk: --image_folder /."
        )
        raise ImageError(name, reason)
    if name[1:2] == ":" or ".." in name.split("/"):
        reason = f"the path leaves the image folder {image_folder}; write it relative to that, without '..'."
        raise ImageError(name, reason)
    path = os.path.join(image_folder, name)
    if not follow_links:
        root = _real_path(image_folder)
        real = os.path.join(_real_path(os.path.dirname(path)), os.path.basename(path))
        if os.path.islink(real):
            real = os.path.realpath(real)
        if os.path.commonpath([root, real]) != root:
            reason = f"a link leads out of the image folder to {real}. If you made it, allow it: --follow_links True."
            raise ImageError(path, reason)
    return path


def _relative(name: str, image_folder: str) -> str:
    """Return an absolute path below the image folder relative to it, and any other name as it is."""
    root = os.path.join(os.path.abspath(image_folder), "")
    is_below = name.startswith(root) and not name.startswith("//")
    return name[len(root) :].lstrip("/") if is_below else name


def find_image(image_folder: str | None, name: str, follow_links: bool = False) -> tuple[str, bool]:
    """Return the path of a record's image, and whether its suffix is not that of `name`.

    Raises ImageError if there is no such file, or if it is outside the image folder.
    """
    if image_folder is None:
        whole = " (--image_folder / for absolute paths)" if name.startswith("/") else ""
        raise ImageError(name, f"no image folder is given; name it with --image_folder{whole}.")
    name = _relative(name, image_folder)
    path = safe_path(image_folder, name, follow_links)
    if os.path.isfile(path):
        return path, False
    stem, suffix = os.path.splitext(name)
    for other in OTHER_SUFFIXES:
        if other != suffix and os.path.isfile(os.path.join(image_folder, stem + other)):
            return safe_path(image_folder, stem + other, follow_links), True
    raise ImageError(path, why_no_file(path))


def why_no_file(path: str) -> str:
    """Return the reason why a path is not one of a regular file."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "it is a link to a file that does not exist." if os.path.islink(path) else "there is no such file."
    except OSError as error:
        return f"{error.strerror}."
    return "it is a directory." if stat.S_ISDIR(mode) else "it is no regular file but a pipe, a socket or a device."


def open_record_image(source: str | bytes, name: str = "in the record"):
    """Return the image of a path, or of the bytes of a file, like open_image; name: of the bytes, for errors."""
    if not isinstance(source, bytes):
        return open_image(source)
    try:
        return open_image(io.BytesIO(source))
    except ImageError as error:
        # Without the memory address of the bytes, which is Pillow's name for them.
        raise ImageError(name, re.sub(r" <_io\.BytesIO [^>]*>", "", error.reason)) from error


def inspect_image(source: str | bytes, decode: bool = False) -> tuple[int, int]:
    """Return width and height from the header; ImageError if the file is not an image, too large, or truncated.

    source: a path, or the bytes of a file. A file with its format's end near its end counts as complete; any other is
    decoded to check it, as is one whose pixels may have no range (CHECKED_MODES). decode: always decode.
    """
    try:
        # open_image has the limit for decompression bombs, and checks it before anything is decoded.
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            (width, height), kind, mode = image.size, image.format, image.mode
    except Exception:
        # open_record_image raises the same error with its reason; if it raises none, the file has just changed.
        width, height = open_record_image(source).size
        return width, height
    if width * height > MAX_IMAGE_PIXELS or decode or mode in CHECKED_MODES or not _has_end(source, kind):
        open_record_image(source)
    return width, height


def _has_end(source: str | bytes, kind: str) -> bool:
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if kind == "WEBP":
            file.seek(4)
            return int.from_bytes(file.read(4), "little") + 8 <= size
        if kind not in _ENDS:
            return False
        file.seek(max(0, size - TAIL_BYTES))
        tail = file.read()
    return _ENDS[kind] in tail
