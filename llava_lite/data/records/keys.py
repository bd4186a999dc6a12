"""Find the keys of a record with media that would not be seen, and those that must not be ignored."""

import os
import re

from llava_lite.data.errors import DataError
from llava_lite.data.records.image_values import describe, is_inline

IMAGE_KEYS = ("image", "images")
SYSTEM_KEYS = ("system", "system_prompt", "system_message")
# Files beside an image, or in its place, for a model with ImageBind; each may have a weight (records/media.py).
MEDIA_KEYS = ("audio", "video", "point", "depth", "thermal", "imu")
WEIGHT_KEYS = tuple(f"{key}_weight" for key in ("image", *MEDIA_KEYS))
# Words of a key that mean media, and words with which it is only about media: image_id, video_length.
IMAGE_WORDS = {"image", "img", "picture", "pic", "photo", "photograph", "screenshot", "frame", "pixel", "media"}
IMAGE_WORDS |= {"visual"}
SOUND_WORDS = {"video", "audio", "movie", "clip"}
_ABOUT = """
id size width height w h x y count num number hash phash sha md5 source license type format mode caption description
text token ratio resolution dir directory folder root class label score tag quality date time timestamp duration length
fps area shape has is category title alt author credit index position dataset split error status model embedding
similarity grid aspect by
"""
ABOUT_WORDS = frozenset(_ABOUT.split())
FILE_KEYS = {"file_name", "filename", "file_names", "file_path", "filepath"}
FILE_KEYS |= {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
# Names of files, not sentences that end with one.
IMAGE_FILE = re.compile(r"^\S+\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif|jp2|heic)$", re.IGNORECASE)
SOUND_FILE = re.compile(r"^\S+\.(?:mp4|avi|mov|mkv|webm|m4v|mpe?g|wav|mp3|flac|ogg|m4a)$", re.IGNORECASE)
# Whether an answer is supervised: 0 or false, 1 or true. They are read of a turn, not of a record.
SUPERVISED_KEYS = ("weight", "loss", "train", "loss_scale")
# Keys that would change the training, each with the reason why it is not read.
NOT_READ = {
    **dict.fromkeys(("tools", "functions", "tool_calls"), "tools and functions are not supported"),
    **dict.fromkeys(
        ("objects", "bbox", "bboxes"),
        "boxes and objects are not read; write them into the texts, in the coordinates that the model is to learn",
    ),
    **dict.fromkeys(
        SUPERVISED_KEYS,
        "a weight or switch of a record is not read; write weight 0 or loss false at an answer, or leave it out",
    ),
    **dict.fromkeys(("history", "input"), "it would be lost beside a conversation; write it as turns"),
    "chat_template_kwargs": "arguments of a chat template for one record are not supported",
}
PREFERENCE_KEYS = ("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images", "kto_tag")


def _words(key: str) -> list[str]:
    """Return the words of a key in lower case, without trailing numbers: imagePath2 is image, path."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)
    words = re.split(r"[^a-z0-9]+", apart.lower())
    return [re.sub(r"\d+$", "", word) or word for word in words if word]


def _is_media_name(key: str, media: set[str]) -> bool:
    # A plural counts as its singular.
    words = [{word, word.removesuffix("s")} for word in _words(key)]
    return any(word & media for word in words) and not any(word & ABOUT_WORDS for word in words)


def _holds(value) -> bool:
    """Return whether a value could be media; numbers and booleans are not."""
    return isinstance(value, (str, bytes, dict, list)) and bool(value)


def _first(value):
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value


def _looks_like(value, file_name: re.Pattern, depth: int = 3) -> bool:
    value = _first(value)
    if isinstance(value, dict):
        # {"bytes", "path"}, or a column of objects that hold one.
        return depth > 0 and any(_looks_like(one, file_name, depth - 1) for one in value.values())
    if isinstance(value, bytes):
        return file_name is IMAGE_FILE
    if not isinstance(value, str):
        return False
    if file_name is IMAGE_FILE and is_inline(value):
        return True
    return (value.startswith(("data:video/", "data:audio/")) and file_name is SOUND_FILE) or bool(
        len(value) < 500 and not value.startswith(("http://", "https://")) and file_name.search(value)
    )


def sound_keys(item: dict) -> list[str]:
    """Return the keys with video or audio."""
    return [
        key
        for key, value in item.items()
        if _holds(value) and (_is_media_name(key, SOUND_WORDS) or _looks_like(value, SOUND_FILE))
    ]


def named_media(item: dict) -> list[str]:
    """Return the keys, other than `image` and `images`, whose name means an image."""
    return [
        key
        for key, value in item.items()
        if key not in IMAGE_KEYS and _holds(value) and (key in FILE_KEYS or _is_media_name(key, IMAGE_WORDS))
    ]


def media_keys(item: dict) -> list[str]:
    """Return the keys with images or other media, by name or by value, that are not read."""
    known = {*sound_keys(item), *named_media(item)}
    return [
        key
        for key, value in item.items()
        if key in known or (key not in IMAGE_KEYS and _holds(value) and _looks_like(value, IMAGE_FILE))
    ]


def check_no_preferences(item: dict, name: str) -> None:
    """Raise DataError for a record of chosen and rejected answers."""
    found = [key for key in PREFERENCE_KEYS if key in item]
    found = found or (["label"] if isinstance(item.get("label"), bool) else [])
    if found:
        raise DataError(
            f"{name} has {', '.join(map(repr, found))}: preference data, of which supervised training would use one "
            f"side only. To train on the conversation: {rewriting(name, '--drop ' + ' '.join(found))}"
        )


def check_keys(item: dict, images: tuple, name: str) -> None:
    """Raise DataError for keys that would change the training, or whose images would not be seen.

    item: the non-empty keys of a record other than its conversation, images and media. images: those that are read,
    and the paths of its media. The error has the name of the record, the key and what to do.
    """
    for key, reason in NOT_READ.items():
        if key in item and not _is_neutral(key, item[key]):
            raise DataError(
                f"{name} has the key {key!r} ({describe(item[key])}): {reason}. To leave the key out: "
                f"{rewriting(name, f'--drop {key}')}"
            )
    sounds = sound_keys(item)
    if sounds:
        raise DataError(
            f"{name} has a {sounds[0]!r}, which is not read: a model with ImageBind as its tower reads the path of a "
            "video under 'video' and that of a sound under 'audio'. Rename the key, remove the record, or extract its "
            "frames as images."
        )
    # Beside images that are read, a file name under another key may be theirs; the content of an image may not.
    found = [*named_media(item), *filter(lambda key: _is_content(item[key]), item)] if images else media_keys(item)
    for key in found:
        if not (images and _is_same(item[key], images)):
            _check_no_unread_media(key, item[key], images, name)


def _is_neutral(key: str, value) -> bool:
    if isinstance(value, dict):
        return all(one in (None, "", [], {}) for one in value.values())
    if key in SUPERVISED_KEYS:
        return isinstance(value, (bool, int, float)) and value == 1
    return value in ("", "[]", "{}") or value == [] or value is False


def _is_content(value) -> bool:
    """Return whether a value is the content of a file, and not its name."""
    value = _first(value)
    if isinstance(value, dict):
        return _is_content(value.get("bytes"))
    return (isinstance(value, bytes) and bool(value)) or (isinstance(value, str) and is_inline(value))


def rewriting(name: str, options: str) -> str:
    """Return the command that rewrites the file of a record; name ends with its position, `(train.json[3])`."""
    file, _, position = name.rpartition("(")[2].partition("[")
    return " ".join(f"llava-lite data convert {file if position else 'FILE'} OUT.json {options}".split())


def _is_same(value, images: tuple) -> bool:
    """Return whether another key names the images that are read, or the URLs of their downloads."""
    values = value if isinstance(value, list) else [value]
    if all(isinstance(image, bytes) for image in images) and all(isinstance(one, str) for one in values):
        # The names of the files that the bytes came from.
        return len(values) == len(images)
    return all(isinstance(one, (str, bytes)) and _names(one, images) for one in values)


def _names(value: str | bytes, images: tuple) -> bool:
    if isinstance(value, bytes) or value in images:
        return value in images
    if value.startswith(("http://", "https://")):
        return True
    files = [os.path.basename(image) for image in images if isinstance(image, str)]
    return os.path.basename(value) in (*files, *(os.path.splitext(file)[0] for file in files))


def _check_no_unread_media(key: str, value, images: tuple, name: str) -> None:
    shown = describe(_first(value))
    if images:
        raise DataError(
            f"{name} has images under 'image' or 'images' and others under {key!r} ({shown}), which would not be "
            f"seen. List all of them under 'images', or leave the key out: {rewriting(name, f'--drop {key}')}"
        )
    raise DataError(
        f"{name} has the key {key!r} ({shown}), an image that would not be seen: images are read from 'image' or "
        f"'images'. Rename the key, or rewrite the file: {rewriting(name, f'--image_key {key}')} (or --drop {key})"
    )
