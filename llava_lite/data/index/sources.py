"""Turn the paths that a user names into sources of records: annotation files, mixtures of them, or shards.

A new file format is a `Reader` and one line in READERS.
"""

import math
import os
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llava_lite.data.converters.tables import KNOWN
from llava_lite.data.errors import DataError
from llava_lite.data.index.captions import Columns, read_columns, read_row, scan_rows
from llava_lite.data.index.mixtures import Entry, read_mixture
from llava_lite.data.index.scan import parse_json, scan_json, scan_lines
from llava_lite.data.records.foreign_files import TABLE_SUFFIXES, check_no_foreign_directory, get_conversion


class Reader(NamedTuple):
    """The functions of a format: `scan` finds the records of a file, `load` reads the object of one.

    head: what `load` must know of the file, None for nothing.
    """

    scan: Callable[[str], np.ndarray]  # path -> byte spans [N, 2]
    load: Callable[[bytes, Any], Any]  # bytes of a span, result of head -> object for parse_record
    head: Callable[[str], Any] = lambda path: None


def load_json(data: bytes, head=None):
    """Return the object of JSON bytes."""
    return parse_json(data)


READERS: dict[str, Reader] = {
    "json": Reader(scan_json, load_json),
    "jsonl": Reader(scan_lines, load_json),
    "csv": Reader(scan_rows, read_row, read_columns),
    "tsv": Reader(scan_rows, read_row, read_columns),
}
MIXTURES = ("yaml", "yml")
RATIO = "ratio:"
# Read in sequence (data/shards) and never indexed: for data sets larger than a local disk.
SHARD_KINDS = ("tar", "parquet", "arrow")


def is_shards(data_path: str | Sequence[str] | None) -> bool:
    """Return whether the paths are shards, or directories of shards; DataError if only some are."""
    paths = [data_path] if isinstance(data_path, (str, os.PathLike)) else list(data_path or ())
    kinds = {
        path.startswith("hf://") or _suffix(path) in SHARD_KINDS or os.path.isdir(path)
        for path in map(os.fspath, paths)
    }
    if len(kinds) > 1:
        raise DataError("--data_path names shards and annotation files; a run reads one kind only.")
    return kinds == {True}


class Source(NamedTuple):
    """A file of records, its image folder, and the sample of its records that is used.

    group: its records share a batch with no others. template: its own conversation template, None for that of the run.
    recipe: a key of RECIPES, which its objects go through.
    """

    path: str
    kind: str  # a key of READERS
    image_folder: str | None = None
    sampling: str = "all"  # all | first:N | end:N | random:N, N a number or a percentage; or ratio:R
    group: str | None = None
    template: str | None = None
    recipe: str | None = None


def sample_positions(sampling: str, num_records: int, seed: int = 0) -> np.ndarray:
    """Return the positions [n] that a sampling strategy keeps, in the order of the file.

    `random:N` samples without replacement with its own seed: the same in every process. A percentage is rounded up
    (LLaVA-NeXT). A number above that of the records means all. `ratio:R` is LLaMA2-Accessory's: int(R N) records, in
    the order of a draw by the seed 0.
    """
    if sampling.startswith(RATIO):
        count = int(num_records * float(sampling.removeprefix(RATIO)))
        if not count:
            raise DataError(f"ratio {sampling.removeprefix(RATIO)} of {num_records} records keeps none of them.")
        return np.array(random.Random(0).sample(range(num_records), count), dtype=np.int64)
    match = re.fullmatch(r"(first|end|random):\s*(\d+(?:\.\d+)?)\s*(%?)", sampling)
    if sampling == "all":
        return np.arange(num_records)
    if not match or float(match[2]) == 0 or ("." in match[2] and not match[3]):
        shown = sampling if len(sampling) < 80 else f"{sampling[:60]}..."
        raise DataError(f"unknown sampling_strategy {shown!r}; known: all, first:N, end:N, random:N (N or N%).")
    # Infinite for one with more than 308 digits.
    amount = float(match[2])
    if amount >= (100 if match[3] else num_records):
        count = num_records
    else:
        count = math.ceil(amount * num_records / 100) if match[3] else int(amount)
    if match[1] == "first":
        return np.arange(count)
    if match[1] == "end":
        return np.arange(num_records - count, num_records)
    return np.sort(np.array(random.Random(seed).sample(range(num_records), count), dtype=np.int64))


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lstrip(".").lower()


def check_captions(path: str, columns: Columns) -> None:
    """Raise DataError for a table that is no caption file: with what is missing, or how to convert it."""
    if columns.has_captions:
        return
    if "url" in columns.names or (len(columns.names) > 1 and not KNOWN & {*columns.names}):
        raise DataError(
            f"{path} has no column of captions: its first line names {', '.join(map(repr, columns.names))}, and a "
            "caption file names `url` and `caption`, with a tab between them."
        )
    raise DataError(f"{path} is a table; convert it first: {get_conversion(path)}")


def _file_source(path: str, image_folder: str | None, sampling: str = "all") -> Source:
    kind = _suffix(path)
    check_no_foreign_directory(path)
    if kind in SHARD_KINDS or os.path.isdir(path):
        raise DataError(
            f"{path}: shards are read only by a training run, as its only --data_path. To check them, or mix them "
            f"with other files, convert them: {get_conversion(path)}"
        )
    if os.path.isfile(path) and path.lower().endswith(TABLE_SUFFIXES):
        check_captions(path, read_columns(path))
    if kind not in READERS:
        known = ", ".join([*READERS, *MIXTURES, *SHARD_KINDS])
        raise DataError(f"{path}: unknown format {kind!r}; known: {known}.")
    if not os.path.isfile(path):
        raise DataError(f"{path}: there is no such annotation file.")
    return Source(path, kind, image_folder, sampling)


def _mixture_source(entry: Entry, mixture_path: str) -> Source:
    if not entry.sampling.startswith(RATIO):
        try:
            sample_positions(entry.sampling, 1)
        except DataError as error:
            raise DataError(f"{mixture_path}: entry {entry.path!r}: {error}") from None
    source = _file_source(entry.path, entry.image_folder, entry.sampling)
    return source._replace(group=entry.group, template=entry.template, recipe=entry.recipe)


def open_sources(data_path: str | Sequence[str], image_folder: str | None = None) -> list[Source]:
    """Return the files of one or more paths; a YAML mixture is replaced by its files."""
    paths = [data_path] if isinstance(data_path, (str, os.PathLike)) else list(data_path)
    sources = []
    for path in map(os.fspath, paths):
        if _suffix(path) in MIXTURES:
            if not os.path.isfile(path):
                raise DataError(f"{path}: there is no such mixture file.")
            sources += [_mixture_source(entry, path) for entry in read_mixture(path, image_folder)]
        else:
            sources.append(_file_source(path, image_folder))
    if not sources:
        raise DataError("no annotation file given; name one with --data_path.")
    return sources
