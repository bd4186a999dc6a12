"""Turn the paths that a user names into shards, and shards into raw records."""

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from llava_lite.data.errors import DataError
from llava_lite.data.index.scan import parse_json
from llava_lite.data.index.sources import SHARD_KINDS
from llava_lite.data.records.foreign_files import check_no_foreign_directory, foreign_file_error
from llava_lite.data.records.formats import ForeignRecord
from llava_lite.data.records.record import Record
from llava_lite.data.shards.files import START, Place, RawRecord, Shard, read_tar
from llava_lite.data.shards.records import ShardRecord, parse_files, parse_row
from llava_lite.data.shards.tables import read_arrow, read_parquet

SHARD_SUFFIXES = tuple(f".{kind}" for kind in SHARD_KINDS)
# JSON files of `datasets` in a directory: the files of one data set, or the names of its splits.
STATE_FILE, SPLITS_FILE = "state.json", "dataset_dict.json"

# Find shards.


def numbered(pattern: str) -> list[str]:
    """Return the paths that WebDataset's braces stand for: `{00000..00331}` counts, with leading zeros."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last, width = int(found[1]), int(found[2]), len(found[1])
    if first > last:
        raise DataError(f"{pattern}: {found[0]} counts down; write the smaller number first.")
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [path for n in range(first, last + 1) for path in numbered(f"{head}{n:0{width}d}{tail}")]


def find_shards(data_path: str | Sequence[str]) -> list[Shard]:
    """Return the shards of paths, globs, `{000..331}` and hf:// URLs, in the same order on every machine.

    An hf:// URL without a suffix names all shards below it.
    """
    found = {}
    for pattern in [data_path] if isinstance(data_path, str) else data_path:
        is_directory = not pattern.lower().endswith(SHARD_SUFFIXES)
        paths = [pattern] if is_directory else numbered(pattern)
        absent = []
        for path in paths:
            here = _shards_at(path, is_directory)
            found |= here
            absent += [] if here else [path]
        if absent:
            check_no_foreign_directory(absent[0])
            what = "patterns have shards" if "*" in pattern and len(paths) > 1 else "shards are"
            there = "no shard is" if is_directory else f"{len(paths) - len(absent)} of {len(paths)} {what}"
            there = f"{absent[0]} is missing, {there}" if len(paths) > 1 else there
            raise DataError(f"{pattern}: {there} there; expected files that end in {' or '.join(SHARD_SUFFIXES)}.")
    return [found[path] for path in sorted(found)]


def _shards_at(path: str, is_directory: bool) -> dict[str, Shard]:
    """Return the shards of a file, a glob or a directory by their normalised paths."""
    from fsspec.core import url_to_fs

    files, root = url_to_fs(path)
    # A file whose name has brackets is that file and not a pattern.
    if "*" not in root and is_directory and files.isdir(root):
        there = files.find(root, detail=True)
        saved = _get_dataset_files(files, root, path)
        # The cache files of `map` and `filter` are in the same directory.
        there = {name: info for name, info in there.items() if _is_wanted(name, root, saved)}
    elif "*" not in root and files.isfile(root):
        there = {root: files.info(root)}
    else:
        there = files.glob(f"{root.rstrip('/')}/**/*" if is_directory else root, detail=True)
    is_local = "://" not in path or path.startswith(("file://", "local://"))
    shards = {}
    for name, info in there.items():
        if name.lower().endswith(SHARD_SUFFIXES):
            shard_path = os.path.normpath(name) if is_local else files.unstrip_protocol(name)
            shards[shard_path] = Shard(shard_path, name.rsplit(".", 1)[-1].lower(), int(info.get("size") or 0))
    return shards


def _get_dataset_files(files, root: str, path: str) -> set[str] | None:
    """Return the files of a directory that save_to_disk of `datasets` wrote; None for any other directory."""
    if files.isfile(f"{root}/{SPLITS_FILE}"):
        splits = parse_json(files.cat_file(f"{root}/{SPLITS_FILE}")).get("splits", [])
        raise DataError(
            f"{path} is a dictionary of data sets of `datasets`; name one of its splits: "
            f"{', '.join(f'{path}/{split}' for split in splits)}."
        )
    if not files.isfile(f"{root}/{STATE_FILE}"):
        return None
    listed = parse_json(files.cat_file(f"{root}/{STATE_FILE}")).get("_data_files", [])
    return {f"{root}/{entry['filename']}" for entry in listed}


def _is_wanted(name: str, root: str, saved: set[str] | None) -> bool:
    if saved is not None and os.path.dirname(name) == root.rstrip("/"):
        return name in saved
    return not (name.endswith(".arrow") and os.path.basename(name).startswith("cache-"))


# Read shards.


class ShardFormat(NamedTuple):
    """The functions that read one kind of shard."""

    read: Callable[..., Iterator[RawRecord]]
    parse: Callable[[RawRecord, str], ShardRecord]


SHARD_FORMATS = {
    "tar": ShardFormat(read_tar, parse_files),
    "parquet": ShardFormat(read_parquet, parse_row),
    "arrow": ShardFormat(read_arrow, parse_row),
}


def read_shard(shard: Shard, place: Place = START, part: int = 0, num_parts: int = 1) -> Iterator[RawRecord]:
    """Yield the raw records of a shard from `place` on; the last one of a corrupt shard has the reason in `error`."""
    last = place
    try:
        for raw in SHARD_FORMATS[shard.kind].read(shard, place, part, num_parts):
            last = raw.after
            yield raw
    except DataError as error:
        yield RawRecord("", last.number, {}, last, error)
    except OSError as error:
        # Errors of a network, which have no number, pass; the run can be started again later.
        is_local = "://" not in shard.path and error.errno is not None
        if not is_local and not isinstance(error, (FileNotFoundError, PermissionError)):
            raise
        reason = error.strerror or type(error).__name__
        reason = f"{shard.path} cannot be read from record {last.number} on ({reason}); records after it are not read."
        yield RawRecord("", last.number, {}, last, DataError(reason))


def parse_shard_record(shard: Shard, raw: RawRecord) -> ShardRecord:
    """Return the record; DataError with shard, key and reason if it cannot be used."""
    if raw.error is not None:
        raise raw.error
    return SHARD_FORMATS[shard.kind].parse(raw, f"{shard.name}[{raw.number}]")


# Records, and shards that they are spread over, that are read to find out whether the shards hold images.
PEEKED_RECORDS, PEEKED_SHARDS = 1000, 20


def first_record(shards: list[Shard]) -> Record | None:
    """Return the first record of the first shard, None if that is empty; DataError if it cannot be used."""
    raw = next(iter(read_shard(shards[0])), None)
    try:
        return None if raw is None else parse_shard_record(shards[0], raw).record
    except ForeignRecord as error:
        raise foreign_file_error(shards[0].path, error) from None


def first_image(shards: list[Shard]) -> int:
    """Return 0 if one of the first records of the shards has an image, else the number of records that were read.

    A record that cannot be read counts as one with an image: its error is reported when it is used.
    """
    num_read, chosen = 0, shards[:: max(1, len(shards) // PEEKED_SHARDS)]
    for shard in chosen:
        for raw in islice(read_shard(shard), math.ceil(PEEKED_RECORDS / len(chosen))):
            num_read += 1
            try:
                record, _ = parse_shard_record(shard, raw)
            except DataError:
                return 0
            if record.images:
                return 0
    return num_read
