"""Turn a raw record of a shard (the files of a tar sample, the columns of a row) into a Record and its images."""

import re
from typing import NamedTuple

from llava_lite.data.errors import DataError
from llava_lite.data.index.scan import parse_json
from llava_lite.data.records.formats import CONVERSATION_KEYS, caption_key, get_formats
from llava_lite.data.records.keys import IMAGE_FILE, IMAGE_KEYS, SOUND_FILE
from llava_lite.data.records.media import check_no_media
from llava_lite.data.records.record import Record, parse_record
from llava_lite.data.records.turns import transpose
from llava_lite.data.shards.files import RawRecord
from llava_lite.data.shards.tables import IMAGE_COLUMNS

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
# Keys under which a part of a message names a file.
PART_FILES = ("image", "image_url", "url", "path")


class ShardRecord(NamedTuple):
    """A Record and its images as files in memory, in the order of their placeholders."""

    record: Record
    images: tuple[bytes, ...]


def sample_item(raw: RawRecord, where: str) -> tuple[dict, dict[str, bytes]]:
    """Return the object of a tar sample (its json, or the caption of its txt), and its images by name, in order.

    The object holds the images as bytes, unless parts of its conversation name them.
    """
    item = _json(raw.parts["json"], raw, where, dict) if "json" in raw.parts else {}
    if "txt" in raw.parts and not any(item.get(key) is not None for key in CONVERSATION_KEYS):
        try:
            item = {"caption": raw.parts["txt"].decode("utf-8")}
        except UnicodeDecodeError as error:
            raise DataError(f"{_name(raw, where)}: the txt is not UTF-8 ({error.reason}).") from None
    _check_no_unread_columns(raw, where)
    suffixes = [name for name in raw.parts if name.rsplit(".", 1)[-1] in IMAGE_SUFFIXES]
    named = next((item[key] for key in IMAGE_KEYS if item.get(key)), None)
    if named and not suffixes:
        raise DataError(f"{_name(raw, where)} names an image, but the shard has no file for it.")
    files = {f"{raw.key}.{suffix}": raw.parts[suffix] for suffix in _in_order(suffixes, named)}
    item = {key: value for key, value in item.items() if key not in IMAGE_KEYS}
    item["id"] = raw.key if item.get("id") is None else item["id"]
    if files and not _parts_name_files(item):
        item["image"] = list(files.values())
    return item, files


def _without_url(item: dict) -> dict:
    """Return an object without the address that its image, a file of the shard, was downloaded from."""
    return {key: value for key, value in item.items() if key != "url"}


def parse_files(raw: RawRecord, where: str) -> ShardRecord:
    """Return the record of a tar sample."""
    item, files = sample_item(raw, where)
    item = _without_url(item)
    check_no_media(item, _name(raw, where), "shards are read for")
    _expect_content(item, raw, where)
    record = parse_record(item, where)
    names = tuple(files) if "image" in item else record.images
    return ShardRecord(record._replace(images=names), with_files(record, files).images)


def with_files(record: Record, files: dict[str, bytes]) -> Record:
    """Return the record of a sample, with the content of the files that it names as its images."""
    return record._replace(images=tuple(_member(image, files, record.name) for image in record.images))


def _check_no_unread_columns(raw: RawRecord, where: str) -> None:
    """Raise DataError for a sample with an image, video or audio file of a format that is not read."""
    for name in raw.parts:
        is_media = IMAGE_FILE.search(f"x.{name}") or SOUND_FILE.search(f"x.{name}")
        if is_media and name.rsplit(".", 1)[-1] not in IMAGE_SUFFIXES:
            raise DataError(
                f"{_name(raw, where)} has a file {name!r}, which is not read; images end in "
                f"{', '.join(IMAGE_SUFFIXES)}."
            )


def _parts_name_files(item: dict) -> bool:
    """Return whether parts of the conversation name their images themselves."""
    turns = next((item[key] for key in CONVERSATION_KEYS if isinstance(item.get(key), list)), [])
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return any(part.get(key) for part in parts for key in PART_FILES)


def _member(image: str | bytes, files: dict[str, bytes], name: str) -> bytes:
    """Return the bytes of an image: its own, or those of the file of the sample that it names."""
    if isinstance(image, bytes) or image in files:
        return image if isinstance(image, bytes) else files[image]
    base = image.rpartition("/")[2].lower()
    found = [data for file, data in files.items() if file.rpartition("/")[2].lower() == base]
    if len(found) != 1:
        there = ", ".join(files) or "none"
        raise DataError(f"{name} names the image {image!r}; the files of the sample are {there}.")
    return found[0]


def _in_order(suffixes: list[str], named) -> list[str]:
    """Return the suffixes of a record's images in the order of its placeholders.

    named: the files that the record lists; their order counts if they are these. Else the order is by name, with
    numbers as numbers.
    """
    named = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    wanted = [str(path).rpartition("/")[2].partition(".")[2].lower() for path in named]
    if sorted(wanted) == sorted(suffixes):
        return wanted
    # Text and numbers alternate, so that 10 comes after 9.
    return sorted(suffixes, key=lambda name: [int(p) if i % 2 else p for i, p in enumerate(re.split(r"(\d+)", name))])


def row_item(raw: RawRecord, where: str) -> dict:
    """Return the object of a row: its columns are the keys of a record, and its images are bytes."""
    item = {key: value for key, value in raw.parts.items() if value is not None}
    if not any(key in item for key in IMAGE_KEYS):
        # Columns named like the files of a tar sample.
        named = next((key for key in IMAGE_COLUMNS if key in item), None)
        item |= {"images": item.pop(named)} if named is not None else {}
    for key in (*CONVERSATION_KEYS, "texts"):
        if isinstance(item.get(key), str):
            item[key] = _json(item[key], raw, where, list, dict)
    if isinstance(item.get("texts"), dict):
        item["texts"] = transpose(item["texts"], f"{_name(raw, where)}: the texts are")
    return item


def parse_row(raw: RawRecord, where: str) -> ShardRecord:
    """Return the record of a row, which must hold its images as bytes."""
    item = _without_url(row_item(raw, where))
    check_no_media(item, _name(raw, where), "shards are read for")
    _expect_content(item, raw, where)
    record = parse_record(item | {"id": raw.key}, where)
    paths = [image for image in record.images if not isinstance(image, bytes)]
    if paths:
        raise DataError(
            f"{_name(raw, where)}: the image is a path ({paths[0]!r}), expected the bytes of the file in the shard."
        )
    names = tuple(f"image {k}" for k in range(len(record.images)))
    return ShardRecord(record._replace(images=names), record.images)


def _expect_content(item: dict, raw: RawRecord, where: str) -> None:
    """Raise DataError for a sample of images without text, or of a caption without an image."""
    if get_formats({key: value for key, value in item.items() if value is not None}):
        return
    images = next((item[key] for key in IMAGE_KEYS if item.get(key) is not None), ())
    count = len(images) if isinstance(images, (list, tuple)) else 1
    raise DataError(
        f"{_name(raw, where)}: {count} images and {'no' if caption_key(item) is None else 'a'} caption (found: "
        f"{', '.join(sorted(raw.parts)) or 'nothing'}); expected an image with a caption (txt, or `caption` in json), "
        "or `conversations`."
    )


def _name(raw: RawRecord, where: str) -> str:
    return f"record {raw.key!r} ({where})"


def _json(data: bytes | str, raw: RawRecord, where: str, *kinds: type):
    try:
        value = parse_json(data)
    except ValueError as error:
        raise DataError(f"{_name(raw, where)}: not JSON: {error}.") from None
    if not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(f"{_name(raw, where)}: the JSON holds {type(value).__name__}, expected {expected}.")
    return value
