"""Find the format of a path, and read it as records for a conversion."""

import os
from collections.abc import Iterator

from llava_lite.data.converters.base import Found, Options
from llava_lite.data.converters.coco import read_coco
from llava_lite.data.converters.image_folder import METADATA, read_image_folder
from llava_lite.data.converters.internvl import read_internvl
from llava_lite.data.converters.items import convert_item
from llava_lite.data.converters.llama_factory import read_llama_factory
from llava_lite.data.converters.tables import read_table
from llava_lite.data.converters.vqa import read_vqa
from llava_lite.data.errors import DataError
from llava_lite.data.index.scan import parse_json, placed_error, scan_json, scan_lines
from llava_lite.data.records.content import without_nulls
from llava_lite.data.records.foreign_files import TABLE_SUFFIXES
from llava_lite.data.records.formats import get_formats
from llava_lite.data.records.record import Record, parse_record
from llava_lite.data.shards.files import RawRecord, Shard
from llava_lite.data.shards.read import SHARD_SUFFIXES, find_shards, read_shard
from llava_lite.data.shards.records import row_item, sample_item, with_files

# Formats of a file that is one object: the reader yields records, or objects that are converted one by one.
FILES_OF_RECORDS = {"COCO captions": read_coco, "VQA questions": read_vqa}
FILES_OF_OBJECTS = {"InternVL meta": read_internvl, "LLaMA-Factory dataset_info": read_llama_factory}
FILE_FORMATS = (*FILES_OF_RECORDS, *FILES_OF_OBJECTS)


def read_foreign(path: str, options: Options) -> Iterator[Found | tuple[str, Record]]:
    """Yield the content of a file or directory: records for parse_record, reasons, or records of shards.

    Raises DataError for an unknown format.
    """
    if "://" in path or path.lower().endswith(SHARD_SUFFIXES) or _holds_shards(path):
        return _of_shards(path, options)
    if os.path.isdir(path):
        options.image_folder = options.image_folder or path
        return _of_objects(read_image_folder(path, options), options)
    if not os.path.isfile(path):
        raise DataError(f"{path}: there is no such file or directory.")
    if path.lower().endswith(TABLE_SUFFIXES):
        return _of_objects(((path, position, item) for position, item in read_table(path, options)), options)
    if not path.lower().endswith((".json", ".jsonl")):
        raise DataError(
            f"{path}: unknown format; known: JSON, JSONL, CSV, TSV, parquet, tar and Arrow files, and directories of "
            "`datasets` or of an ImageFolder."
        )
    return _of_json(path, options)


def _holds_shards(path: str) -> bool:
    """Return whether a directory has shards, and no metadata of an ImageFolder."""
    names = {name for _, _, names in os.walk(path) for name in names} if os.path.isdir(path) else set()
    return not names & set(METADATA) and any(name.lower().endswith(SHARD_SUFFIXES) for name in names)


def _of_shards(path: str, options: Options) -> Iterator[Found | tuple[str, Record]]:
    for shard in find_shards(path):
        for raw in read_shard(shard):
            where = f"{shard.name}[{raw.number}]"
            try:
                yield from list(_of_raw(shard, raw, where, options))
            except DataError as error:
                yield Found(where, None, str(error))


def _of_raw(shard: Shard, raw: RawRecord, where: str, options: Options) -> Iterator[tuple[str, Record]]:
    """Yield the records of a sample or row of any format, with their images as bytes."""
    if raw.error is not None:
        raise raw.error
    item, files = sample_item(raw, where) if shard.kind == "tar" else (row_item(raw, where) | {"id": raw.key}, {})
    for one in convert_item(item, where, options):
        record = parse_record(one, where)
        yield where, with_files(record, files) if files else record


def _of_objects(objects, options: Options) -> Iterator[Found]:
    """Yield the records of (file, position, object); `_reason` in an object is why it could not be read."""
    for file, position, item in objects:
        where = f"{os.path.basename(file)}[{position}]"
        if isinstance(item, dict) and "_reason" in item:
            yield Found(where, None, item["_reason"])
            continue
        try:
            # A list first, so that an object gives all of its records or none.
            yield from [Found(where, one) for one in convert_item(item, where, options)]
        except DataError as error:
            yield Found(where, None, str(error))


def _of_json(path: str, options: Options) -> Iterator[Found]:
    try:
        spans = (scan_lines if path.lower().endswith(".jsonl") else scan_json)(path)
    except DataError as error:
        return _of_one_object(path, options, _load(path), error)
    if len(spans) == 1:
        # One line may be one record, or a complete data set.
        item = _load(path)
        if isinstance(item, dict) and _file_format(item) is not None:
            return _of_one_object(path, options, item)
    return _of_objects(_json_objects(path, spans), options)


def _json_objects(path: str, spans):
    with open(path, "rb") as file:
        for position, (start, stop) in enumerate(spans.tolist()):
            file.seek(start)
            data = file.read(stop - start)
            try:
                yield path, position, parse_json(data)
            except ValueError as error:
                yield path, position, {"_reason": str(placed_error(path, start, data, error))}
            except RecursionError:
                yield path, position, {"_reason": f"{path}[{position}] is nested too deeply to be a record."}


def _load(path: str):
    with open(path, "rb") as file:
        data = file.read()
    try:
        return parse_json(data)
    except ValueError as error:
        raise placed_error(path, 0, data, error) from None


def _file_format(item: dict) -> str | None:
    return next((name for name in get_formats(without_nulls(item)) if name in FILE_FORMATS), None)


def _of_one_object(path: str, options: Options, item, error: DataError | None = None) -> Iterator[Found]:
    found = _file_format(item) if isinstance(item, dict) else None
    if found in FILES_OF_RECORDS:
        return FILES_OF_RECORDS[found](item, os.path.basename(path), options)
    if found == "InternVL meta":
        options.image_folder = options.image_folder or "."
    if found in FILES_OF_OBJECTS:
        return _of_objects(FILES_OF_OBJECTS[found](item, path, options), options)
    if isinstance(item, list) and item and all(isinstance(one, list) for one in item):
        # Qwen-VL's packed data: each inner list is a pack; training makes its own packs.
        options.notes["lists of records split up (--packing tokens packs them again)"] += len(item)
        return _of_objects(((path, k, one) for k, one in enumerate(one for pack in item for one in pack)), options)
    if isinstance(item, dict) and isinstance(item.get("data"), list):
        # As in TextVQA.
        return _of_objects(((path, position, one) for position, one in enumerate(item["data"])), options)
    if isinstance(item, dict) and "VQA answers" in get_formats(without_nulls(item)):
        raise DataError(
            f"{path} has the answers of a VQA data set; name the file of its questions, and this one with "
            "--annotations."
        )
    if not isinstance(item, dict):
        raise error or DataError(f"{path} has no list of records.")
    keys = ", ".join(map(repr, item))[:200]
    raise DataError(f"{path} has {keys}; expected a list of records, or one of {', '.join(FILE_FORMATS)}.")
