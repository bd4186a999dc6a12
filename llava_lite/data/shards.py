"""Turn shards into records with their pictures in bytes: which files, what a record is, what is wrong with one."""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.data.records import SHARD_KINDS, Record, parse_record
from llava_lite.data.scan import DataError
from llava_lite.data.shard_files import (
    CAPTION_KEYS,
    PICTURE_COLUMNS,
    START,
    Place,
    RawRecord,
    Shard,
    read_parquet,
    read_tar,
)

SHARD_SUFFIXES = tuple(f".{kind}" for kind in SHARD_KINDS)
PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")


class ShardRecord(NamedTuple):
    """A Record and its pictures as files in memory, in the order of their marks."""

    record: Record
    pictures: tuple[bytes, ...]


# Which files there are.


def numbered(pattern: str) -> list[str]:
    """Return the paths that WebDataset's braces stand for: `{00000..00331}` counts, with leading zeros."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last, width = int(found[1]), int(found[2]), len(found[1])
    if first > last:
        raise DataError(f"{pattern}: {found[0]} counts down and names nothing; write the smaller number first.")
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [path for n in range(first, last + 1) for path in numbered(f"{head}{n:0{width}d}{tail}")]


def find_shards(data_path: str | Sequence[str]) -> list[Shard]:
    """Return the shards behind paths, globs, `{000..331}` and hf:// addresses, in one order on every machine.

    An hf:// address without a suffix stands for all shards below it.
    """
    found = {}
    for pattern in [data_path] if isinstance(data_path, str) else data_path:
        is_folder = not pattern.lower().endswith(SHARD_SUFFIXES)
        paths = [pattern] if is_folder else numbered(pattern)
        absent = []
        for path in paths:
            here = _shards_at(path, is_folder)
            found |= here
            absent += [] if here else [path]
        if absent:
            what = "patterns have shards" if "*" in pattern and len(paths) > 1 else "shards are"
            there = "no shard is" if is_folder else f"{len(paths) - len(absent)} of {len(paths)} {what}"
            there = f"{absent[0]} is missing, {there}" if len(paths) > 1 else there
            raise DataError(f"{pattern}: {there} there; expected files that end in {' or '.join(SHARD_SUFFIXES)}.")
    return [found[path] for path in sorted(found)]


def _shards_at(path: str, is_folder: bool) -> dict[str, Shard]:
    """Return the shards of a file, a glob or a folder by their places, of which a file has one however it is named."""
    from fsspec.core import url_to_fs

    files, root = url_to_fs(path)
    # What is there goes before what brackets in its name would stand for.
    if "*" not in root and is_folder and files.isdir(root):
        there = files.find(root, detail=True)
    elif "*" not in root and files.isfile(root):
        there = {root: files.info(root)}
    else:
        there = files.glob(f"{root.rstrip('/')}/**/*" if is_folder else root, detail=True)
    is_local = "://" not in path or path.startswith(("file://", "local://"))
    shards = {}
    for name, info in there.items():
        if name.lower().endswith(SHARD_SUFFIXES):
            place = os.path.normpath(name) if is_local else files.unstrip_protocol(name)
            shards[place] = Shard(place, name.rsplit(".", 1)[-1].lower(), int(info.get("size") or 0))
    return shards


# What a record is.


def parse_files(raw: RawRecord, where: str) -> ShardRecord:
    """Return the record of a tar file's sample: pictures beside a txt, which is a caption, or a json."""
    item = _json(raw.parts["json"], raw, where) if "json" in raw.parts else {}
    names = _in_order([name for name in raw.parts if name.rsplit(".", 1)[-1] in PICTURE_SUFFIXES], item.get("image"))
    pictures = tuple(raw.parts[name] for name in names)
    if "txt" in raw.parts and "conversations" not in item:
        try:
            item = {"caption": raw.parts["txt"].decode("utf-8")}
        except UnicodeDecodeError as error:
            raise DataError(f"{_name(raw, where)}: the txt is not UTF-8 ({error.reason}).") from None
    return _shard_record(item, pictures, [f"{raw.key}.{name}" for name in names], raw, where)


def _in_order(suffixes: list[str], said) -> list[str]:
    """Return the suffixes of a record's pictures in the order of its marks.

    That of the files that the record itself names, if they are these; else by name, with numbers as numbers.
    """
    said = [said] if isinstance(said, str) else said if isinstance(said, list) else []
    wanted = [str(path).rpartition("/")[2].partition(".")[2].lower() for path in said]
    if sorted(wanted) == sorted(suffixes):
        return wanted
    # Words and numbers in turn, so that 10 comes behind 9.
    return sorted(suffixes, key=lambda name: [int(p) if i % 2 else p for i, p in enumerate(re.split(r"(\d+)", name))])


def parse_row(raw: RawRecord, where: str) -> ShardRecord:
    """Return the record of a row: `image` or `images` beside `conversations` or a `caption`."""
    values = next((raw.parts[name] for name in PICTURE_COLUMNS if raw.parts.get(name) is not None), [])
    pictures = tuple(_picture_bytes(value, raw, where) for value in (values if isinstance(values, list) else [values]))
    item = {name: raw.parts[name] for name in CAPTION_KEYS if raw.parts.get(name) is not None}
    talk = raw.parts.get("conversations")
    if isinstance(talk, str):
        talk = _json(talk, raw, where, list)
    if isinstance(talk, dict):
        # As `datasets` once stored a list of objects: an object of lists.
        lengths = [len(values) if isinstance(values, list) else type(values).__name__ for values in talk.values()]
        if len(set(lengths)) != 1 or not isinstance(lengths[0], int):
            found = ", ".join(f"{key} {length}" for key, length in zip(talk, lengths, strict=True)) or "nothing"
            raise DataError(f"{_name(raw, where)}: the conversations are {found}; expected equally long lists.")
        talk = [dict(zip(talk, turn, strict=True)) for turn in zip(*talk.values(), strict=True)]
    if talk is not None:
        item["conversations"] = talk
    return _shard_record(item, pictures, [f"picture {k}" for k in range(len(pictures))], raw, where)


def _picture_bytes(value, raw: RawRecord, where: str) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        path = f"a path ({value.get('path')!r}) and no bytes" if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{_name(raw, where)}: the picture is {path}; expected its bytes in the shard.")
    return data


def _name(raw: RawRecord, where: str) -> str:
    return f"record {raw.key!r} ({where})"


def _json(data: bytes | str, raw: RawRecord, where: str, kind: type = dict):
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{_name(raw, where)}: not JSON: {error}.") from None
    if not isinstance(value, kind):
        raise DataError(f"{_name(raw, where)}: the JSON holds {type(value).__name__}, expected {kind.__name__}.")
    return value


def _shard_record(item: dict, pictures: tuple, names: list[str], raw: RawRecord, where: str) -> ShardRecord:
    if "conversations" in item:
        if item.get("image") and not pictures:
            raise DataError(f"{_name(raw, where)} names a picture, but the shard holds none for it.")
        record_id = raw.key if item.get("id") is None else item["id"]
        talk = {"id": record_id, "conversations": item["conversations"]}
        return ShardRecord(parse_record(talk | ({"image": names} if names else {}), where), pictures)
    caption = next((item[key] for key in CAPTION_KEYS if item.get(key) is not None), None)
    if caption is None or len(pictures) != 1:
        found = ", ".join(sorted(raw.parts)) or "nothing"
        raise DataError(
            f"{_name(raw, where)}: {len(pictures)} pictures and {'no' if caption is None else 'a'} caption (found: "
            f"{found}); expected a picture with a caption (txt, or `caption` in json), or `conversations`."
        )
    if not isinstance(caption, str) or not caption.strip():
        raise DataError(f"{_name(raw, where)}: the caption is empty or no text.")
    turns = [{"from": "human", "value": DEFAULT_IMAGE_TOKEN}, {"from": "gpt", "value": caption.strip()}]
    return ShardRecord(parse_record({"id": raw.key, "conversations": turns, "image": names}, where), pictures)


class ShardFormat(NamedTuple):
    """How a kind of shard is read."""

    read: Callable[..., Iterator[RawRecord]]
    parse: Callable[[RawRecord, str], ShardRecord]


SHARD_FORMATS = {"tar": ShardFormat(read_tar, parse_files), "parquet": ShardFormat(read_parquet, parse_row)}


def read_shard(shard: Shard, place: Place = START, part: int = 0, num_parts: int = 1) -> Iterator[RawRecord]:
    """Yield the raw records of a shard from `place` on; where it is broken, the last one holds the reason."""
    last = place
    try:
        for raw in SHARD_FORMATS[shard.kind].read(shard, place, part, num_parts):
            last = raw.after
            yield raw
    except DataError as error:
        yield RawRecord("", last.number, {}, last, error)


def parse_shard_record(shard: Shard, raw: RawRecord) -> ShardRecord:
    """Return the record; DataError with shard, key and reason if it is none."""
    if raw.error is not None:
        raise raw.error
    return SHARD_FORMATS[shard.kind].parse(raw, f"{shard.name}[{raw.number}]")
