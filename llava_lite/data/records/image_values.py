"""Turn the value of a record's image key, in any of its spellings, into paths and bytes of image files."""

import base64
import binascii
import re

from llava_lite.data.errors import DataError

# The first characters of JPEG, PNG, GIF, WebP, BMP and TIFF files as base64 text.
BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0AK")
INLINE_STARTS = ("data:", *BASE64_STARTS)
# A sentence that begins with one of these has a space soon.
BASE64_ONLY = re.compile(r"[A-Za-z0-9+/\r\n]+=*\s*\Z")
# The smallest PNG has 67 bytes, 92 characters of base64.
LEAST_BASE64_LEN = 90
# Keys of an object's image; the first one found is used: `datasets` writes {"bytes", "path"}, OpenAI {"url"}.
DICT_KEYS = ("bytes", "path", "url", "image", "image_url", "base64", "file_name", "source")


def describe(value) -> str:
    """Return type and value for a message, shortened."""
    if isinstance(value, (dict, list)):
        return type(value).__name__
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) < 80 else shown[:60] + '...'}"


def read_images(value, key: str, name: str) -> tuple[str | bytes, ...]:
    """Return the images of one key: paths below the image folder, or the bytes of files.

    value: None, a path, a data URL, base64 text, bytes, an object such as {"bytes", "path"}, or a list of these.
    Raises DataError with the name of the record for anything else, also for empty values.
    """
    if value is None or (isinstance(value, dict) and value and all(part is None for part in value.values())):
        # Arrow may store an absent object as one of absent parts.
        return ()
    values = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(read_image(one, key, name) for one in values)


def read_image(value, key: str, name: str) -> str | bytes:
    """Return a path, or the bytes of an image file."""
    if isinstance(value, str) and value:
        return _inline(value, key, name) if value.startswith(INLINE_STARTS) else value
    if isinstance(value, (bytes, bytearray, memoryview)) and len(value):
        return bytes(value)
    if isinstance(value, dict):
        return _of_object(value, key, name)
    raise DataError(
        f"{name}: {key!r} holds {describe(value)}, expected a path or the bytes of an image. Leave the key out if the "
        "record has no image."
    )


def _of_object(value: dict, key: str, name: str) -> str | bytes:
    found = next((part for part in DICT_KEYS if value.get(part)), None)
    if found is None:
        raise DataError(
            f"{name}: {key!r} holds an object with {', '.join(map(repr, value)) or 'nothing'} and no image in it; "
            "expected bytes or a path, as in {'bytes': ..., 'path': ...}."
        )
    if found == "source":
        return _of_source(value[found], key, name)
    if found in ("bytes", "base64") and isinstance(value[found], str) and not value[found].startswith("data:"):
        return decode_base64(value[found], key, name)
    return read_image(value[found], key, name)


def _of_source(source, key: str, name: str) -> str | bytes:
    """Return the image of Anthropic's {"type": "base64", "media_type", "data"} or {"type": "url", "url"}."""
    if isinstance(source, dict) and source.get("type") == "base64" and isinstance(source.get("data"), str):
        return decode_base64(source["data"], key, name)
    if isinstance(source, dict) and source.get("type") in ("url", "file"):
        return read_image(source.get("url") or source.get("path"), key, name)
    if isinstance(source, str):
        return read_image(source, key, name)
    raise DataError(f"{name}: {key!r} has the source {describe(source)}; expected base64 data or a url.")


def is_inline(text: str) -> bool:
    """Return whether a text is the content of an image file: a data URL, or base64 of a known format."""
    if text.startswith("data:"):
        return text.startswith("data:image/")
    return len(text) >= LEAST_BASE64_LEN and text.startswith(BASE64_STARTS) and bool(BASE64_ONLY.match(text[:400]))


def _inline(text: str, key: str, name: str) -> str | bytes:
    if text.startswith("data:"):
        head, comma, data = text.partition(",")
        if not comma or not head.endswith(";base64") or not head.startswith(("data:image/", "data:;base64")):
            raise DataError(f"{name}: {key!r} holds {text[:40]!r}..., expected data:image/...;base64,... .")
        return decode_base64(data, key, name)
    if len(text) < LEAST_BASE64_LEN or "." in text:
        return text
    return decode_base64(text, key, name)


def decode_base64(text: str, key: str, name: str) -> bytes:
    """Return the bytes of base64 text; DataError with the name of the record if it is not base64."""
    try:
        # MIME breaks base64 into lines.
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{name}: {key!r} holds text that is not base64 ({error}).") from None
    if not data:
        raise DataError(f"{name}: {key!r} holds base64 text without content.")
    return data
