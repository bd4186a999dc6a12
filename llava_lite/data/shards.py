"""Turn the paths that a user names into shards, and shards into raw records: which files, and in which order."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from llava_lite.data.foreign_files import foreign_file_error, refuse_foreign_directory
from llava_lite.data.record_formats import ForeignRecord
from llava_lite.data.records import Record
from llava_lite.data.scan import DataError
from llava_lite.data.shard_files import START, Place, RawRecord, Shard, read_tar
from llava_lite.data.shard_records import ShardRecord, parse_files, parse_row
from llava_lite.data.shard_tables import read_arrow, read_parquet
from llava_lite.data.sources import SHARD_KINDS

SHARD_SUFFIXES = tuple(f".{kind}" for kind in SHARD_KINDS)
# What `datasets` writes beside the rows of a directory: the files of one data set, or the names of its splits.
STATE_FILE, SPLITS_FILE = "state.json", "dataset_dict.json"

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
            refuse_foreign_directory(absent[0])
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
        saved = _files_of_datasets(files, root, path)
        # Beside them lie what `map` and `filter` have kept for themselves.
        there = {name: info for name, info in there.items() if _is_wanted(name, root, saved)}
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


def _files_of_datasets(files, root: str, path: str) -> set[str] | None:
    """Return the files that save_to_disk of `datasets` wrote into a directory; None if it wrote none of it."""
    if files.isfile(f"{root}/{SPLITS_FILE}"):
        splits = json.loads(files.cat_file(f"{root}/{SPLITS_FILE}")).get("splits", [])
        raise DataError(
            f"{path} is a dictionary of data sets of `datasets`; name one of its splits: "
            f"{', '.join(f'{path}/{split}' for split in splits)}."
        )
    if not files.isfile(f"{root}/{STATE_FILE}"):
        return None
    listed = json.loads(files.cat_file(f"{root}/{STATE_FILE}")).get("_data_files", [])
    return {f"{root}/{entry['filename']}" for entry in listed}


def _is_wanted(name: str, root: str, saved: set[str] | None) -> bool:
    if saved is not None and os.path.dirname(name) == root.rstrip("/"):
        return name in saved
    return not (name.endswith(".arrow") and os.path.basename(name).startswith("cache-"))


# Reading them.


class ShardFormat(NamedTuple):
    """How a kind of shard is read."""

    read: Callable[..., Iterator[RawRecord]]
    parse: Callable[[RawRecord, str], ShardRecord]


SHARD_FORMATS = {
    "tar": ShardFormat(read_tar, parse_files),
    "parquet": ShardFormat(read_parquet, parse_row),
    "arrow": ShardFormat(read_arrow, parse_row),
}


def read_shard(shard: Shard, place: Place = START, part: int = 0, num_parts: int = 1) -> Iterator[RawRecord]:
    """Yield the raw records of a shard from `place` on; where it is broken, the last one holds the reason."""
    last = place
    try:
        for raw in SHARD_FORMATS[shard.kind].read(shard, place, part, num_parts):
            last = raw.after
            yield raw
    except DataError as error:
        yield RawRecord("", last.number, {}, last, error)
    except OSError as error:
        # A network, whose errors have no number, comes back, and a run can be started again then.
        is_of_disk = "://" not in shard.path and error.errno is not None
        if not is_of_disk and not isinstance(error, (FileNotFoundError, PermissionError)):
            raise
        reason = error.strerror or type(error).__name__
        reason = f"{shard.path} cannot be read from record {last.number} on ({reason}); none behind it is read."
        yield RawRecord("", last.number, {}, last, DataError(reason))


def parse_shard_record(shard: Shard, raw: RawRecord) -> ShardRecord:
    """Return the record; DataError with shard, key and reason if it is none."""
    if raw.error is not None:
        raise raw.error
    return SHARD_FORMATS[shard.kind].parse(raw, f"{shard.name}[{raw.number}]")


# How many records are looked at to know whether shards hold images, of so many of the shards.
PEEKED_RECORDS, PEEKED_SHARDS = 1000, 20


def first_record(shards: list[Shard]) -> Record | None:
    """Return the first record of the first shard, None if that is empty; DataError if it is none."""
    raw = next(iter(read_shard(shards[0])), None)
    try:
        return None if raw is None else parse_shard_record(shards[0], raw).record
    except ForeignRecord as error:
        raise foreign_file_error(shards[0].path, error) from None


def first_image(shards: list[Shard]) -> int:
    """Return 0 if an image is among the first records of the shards, else the number of records that were looked at.

    Records that cannot be read count as if they had one: what is wrong with them is said when they are used.
    """
    num_seen, chosen = 0, shards[:: max(1, len(shards) // PEEKED_SHARDS)]
    for shard in chosen:
        for raw in islice(read_shard(shard), math.ceil(PEEKED_RECORDS / len(chosen))):
            num_seen += 1
            try:
                record, _ = parse_shard_record(shard, raw)
            except DataError:
                return 0
            if record.images:
                return 0
    return num_seen
