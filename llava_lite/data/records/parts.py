"""Turn the content of a turn (a text, or a list of text and image parts) into text with image placeholders."""

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.data.errors import DataError
from llava_lite.data.records.image_values import describe, read_image
from llava_lite.data.records.keys import media_keys

TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image", "image_file")


def check_text(text: str, name: str) -> str:
    """Return the text; DataError if it has half of a surrogate pair, which no tokenizer accepts."""
    try:
        # JSON may contain one ("\\ud83d").
        _ = text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name}: the text has {text[error.start]!r}, half of a surrogate pair.") from None
    return text


def read_content(content, name: str) -> tuple[str, list[str | bytes | None]]:
    """Return the text of a turn, with a placeholder for each image part, and the images of these parts."""
    if isinstance(content, str):
        return check_text(content, name), []
    if not isinstance(content, (list, tuple)):
        raise DataError(f"{name}: the 'value' of a turn is {describe(content)}, expected a string or a list of parts.")
    texts, images = [], []
    for part in content:
        kind, value = _read_part(part, name)
        if kind == "text":
            texts.append(check_text(value, name))
        else:
            texts.append(DEFAULT_IMAGE_TOKEN)
            images.append(value)
    return "".join(texts), images


def _read_part(part, name: str) -> tuple[str, str | bytes | None]:
    """Return ("text", its text) or ("image", its image, None if the image is in `images` of the record)."""
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, dict):
        raise DataError(f"{name}: a part of a turn is {describe(part)}, expected an object with 'type'.")
    # Parquet and Arrow fill absent keys of an object with null.
    given = {key: value for key, value in part.items() if value is not None}
    kind = given.get("type") or _untyped(given, name)
    if kind in TEXT_PARTS:
        extra = [key for key in given if key not in ("type", "text", "index", "cache_control", "annotations")]
        if not isinstance(given.get("text"), str):
            raise DataError(f"{name}: a part of type {kind!r} has no 'text' (it has {', '.join(given)}).")
        if media_keys({key: given[key] for key in extra}) or {"image", "images"} & set(extra):
            raise DataError(f"{name}: a part of type {kind!r} holds {', '.join(extra)} beside its text.")
        return "text", given["text"]
    if kind in IMAGE_PARTS:
        if given.get("text"):
            raise DataError(f"{name}: a part of type {kind!r} holds text as well; make two parts of it.")
        found = [key for key in ("image", "image_url", "url", "path", "base64", "bytes", "source", "image_file")
                 if given.get(key)]  # fmt: skip
        if len(found) > 1 and {"path", "bytes"} != set(found):
            raise DataError(f"{name}: an image part names its image {len(found)} times: {', '.join(found)}.")
        return "image", _part_image(given, found, name)
    raise DataError(
        f"{name}: a part is of type {kind!r}; known: {', '.join((*TEXT_PARTS, *IMAGE_PARTS))}. A video or a sound is "
        "named under 'video' or 'audio' of the record, for a model with ImageBind; other files are not supported."
    )


def _untyped(part: dict, name: str) -> str:
    """Return the type of a part without 'type': Qwen-VL writes {"image": ...} and {"text": ...}."""
    kinds = [kind for kind in ("text", "image", "image_url") if kind in part]
    if len(kinds) != 1:
        raise DataError(f"{name}: a part has {', '.join(map(repr, part)) or 'nothing'}, expected 'type'.")
    return kinds[0]


def _part_image(part: dict, found: list[str], name: str) -> str | bytes | None:
    if not found:
        unread = [key for key in part if key not in ("type", "detail", "index")]
        if unread:
            raise DataError(f"{name}: an image part has {', '.join(unread)}, expected image, image_url, url or path.")
        return None
    key = found[0]
    # {"bytes", "path"}, base64 text and the rest are read like the record's own images.
    return read_image(part if key in ("bytes", "path", "base64", "source") else part[key], key, name)
