"""Read images and conversation of a record in any format that is read directly; no key is ignored silently."""

from llava_lite.data.errors import DataError
from llava_lite.data.records.formats import FORMATS, Content, ForeignRecord, RecordFormat, get_formats
from llava_lite.data.records.image_values import describe, read_images
from llava_lite.data.records.keys import (
    IMAGE_KEYS,
    MEDIA_KEYS,
    SYSTEM_KEYS,
    WEIGHT_KEYS,
    check_keys,
    check_no_preferences,
    media_keys,
    named_media,
    rewriting,
)
from llava_lite.data.records.media import get_paths, mix_images
from llava_lite.data.records.parts import check_text

# Keys that are read beside those of the conversation.
OWN_KEYS = ("id", *SYSTEM_KEYS, *IMAGE_KEYS, *MEDIA_KEYS, *WEIGHT_KEYS)


def read_content(item: dict, name: str) -> Content:
    """Return images and conversation of a record in any format that is read directly.

    Raises ForeignRecord for a format that must be converted, DataError for an unknown or ambiguous one.
    """
    given = without_nulls(item)
    check_no_preferences(given, name)
    found = get_formats(given)
    if len(found) > 1:
        raise DataError(f"{name} could be {' or '.join(found)}; keep the keys of one of them.")
    if not found:
        keys = ", ".join(map(repr, given)) or "nothing"
        raise DataError(
            f"{name}: 'conversations' is NoneType None, expected a list of turns (or 'messages', or an image with a "
            f"caption); the record has {keys}."
        )
    chosen = FORMATS[found[0]]
    if chosen.read is None:
        raise _foreign(found[0], chosen, given, name)
    images = mix_images(given, _read_both(given, name), name)
    content = chosen.read(given, images, name)
    content = _with_parts(_with_system(given, content, name), name)
    rest = {key: value for key, value in given.items() if key not in (*OWN_KEYS, *content.keys)}
    check_keys(rest, tuple(get_paths(content.images)), name)
    return content


def without_nulls(item: dict) -> dict:
    """Return the keys that are not null: tables and Arrow fill absent ones with null."""
    return {key: value for key, value in item.items() if value is not None}


def _foreign(found: str, chosen: RecordFormat, item: dict, name: str) -> DataError:
    if chosen.options is None:
        message = f"{name} is of the format {found!r}, which is not supported: {chosen.reason}."
        return ForeignRecord(message, found, None, chosen.reason)
    options = chosen.options.replace("KEY", (media_keys(item) or ["KEY"])[0]).replace("NAME", next(iter(item)))
    if "--image_key" not in options and not any(item.get(key) for key in IMAGE_KEYS) and named_media(item):
        options = f"{options} --image_key {named_media(item)[0]}".strip()
    message = f"{name} is of the format {found!r}; convert the file first: {rewriting(name, options)}"
    return ForeignRecord(message, found, options)


def _read_both(item: dict, name: str) -> tuple:
    """Return the images of `image` or `images`; if both are present they must be equal."""
    found = [read_images(item[key], key, name) for key in IMAGE_KEYS if key in item]
    if len(found) == 2 and found[0] and found[1] and found[0] != found[1]:
        raise DataError(
            f"{name} has 'image' ({len(found[0])}) and 'images' ({len(found[1])}), and they differ. Keep the one with "
            "all of them."
        )
    return next((images for images in found if images), ())


def _with_system(item: dict, content: Content, name: str) -> Content:
    """Return the content with the system text of the record, if it has one that is not empty."""
    found = [key for key in SYSTEM_KEYS if item.get(key) not in (None, "")]
    if not found:
        return content
    key, spoken = found[0], content.dialogue.system
    system = item[key]
    if not isinstance(system, str):
        raise DataError(f"{name}: {key!r} is {describe(system)}, expected a string.")
    if any(item[other] != system for other in found):
        raise DataError(f"{name} has {' and '.join(map(repr, found))}, and they differ. Keep one.")
    if spoken is not None and spoken != system:
        raise DataError(
            f"{name} has a system text under {key!r} and another in its system turn; keep one of {system[:60]!r} and "
            f"{spoken[:60]!r}."
        )
    return content._replace(dialogue=content.dialogue._replace(system=check_text(system, name)))


def _with_parts(content: Content, name: str) -> Content:
    """Return the content with the images that its parts name themselves."""
    shown = content.dialogue.images
    if not shown or all(image is None for image in shown):
        return content
    if any(image is None for image in shown):
        raise DataError(f"{name}: some image parts name their image and others do not; name all of them or none.")
    if content.images and content.images != shown:
        raise DataError(
            f"{name}: image parts name their images, and 'image' or 'images' names others. Keep one of the two."
        )
    return content._replace(images=shown)
