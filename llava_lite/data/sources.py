"""Turn the paths that a user names into sources of records: annotation files, mixtures of them, or shards.

The YAML mixture is LLaVA-NeXT's. A new file format is a `Reader` and one line in READERS.
"""

import math
import os
import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from llava_lite.data.foreign_files import TABLE_SUFFIXES, conversion_of, refuse_foreign_directory
from llava_lite.data.records import Record, parse_json_record
from llava_lite.data.scan import DataError, scan_json, scan_lines


class Reader(NamedTuple):
    """How a format is read: `scan` finds the records of a file once, `parse` reads one of them."""

    scan: Callable[[str], np.ndarray]  # path -> byte spans [N, 2]
    parse: Callable[[bytes, str, str | None], Record]  # bytes of a span, where, image folder -> Record


READERS: dict[str, Reader] = {
    "json": Reader(scan_json, parse_json_record),
    "jsonl": Reader(scan_lines, parse_json_record),
}
MIXTURES = ("yaml", "yml")
# Read from first to last by data/shards.py and never indexed: sets that no disk of ours holds.
SHARD_KINDS = ("tar", "parquet", "arrow")


def is_shards(data_path: str | Sequence[str] | None) -> bool:
    """Say whether the paths are shards, or folders of them; DataError if some are and some are not."""
    paths = [data_path] if isinstance(data_path, (str, os.PathLike)) else list(data_path or ())
    kinds = {
        path.startswith("hf://") or _suffix(path) in SHARD_KINDS or os.path.isdir(path)
        for path in map(os.fspath, paths)
    }
    if len(kinds) > 1:
        raise DataError("--data_path names shards and annotation files; a run reads the one kind or the other.")
    return kinds == {True}


class Source(NamedTuple):
    """A file of records, where its pictures lie, and which of its records are used."""

    path: str
    kind: str  # a key of READERS
    image_folder: str | None = None
    sampling: str = "all"  # all | first:N | end:N | random:N, N a number or a percentage


def sample_positions(sampling: str, num_records: int, seed: int = 0) -> np.ndarray:
    """Return the positions [n] that a sampling strategy keeps, in the order of the file.

    `random:N` draws without replacement from a generator of its own: the same for every process. A percentage is
    rounded up (LLaVA-NeXT). More than the file holds means all of it.
    """
    match = re.fullmatch(r"(first|end|random):\s*(\d+(?:\.\d+)?)\s*(%?)", sampling)
    if sampling == "all":
        return np.arange(num_records)
    if not match or float(match[2]) == 0 or ("." in match[2] and not match[3]):
        raise DataError(f"unknown sampling_strategy {sampling!r}; known: all, first:N, end:N, random:N (N or N%).")
    share = float(match[2])
    count = min(num_records, math.ceil(share * num_records / 100) if match[3] else int(share))
    if match[1] == "first":
        return np.arange(count)
    if match[1] == "end":
        return np.arange(num_records - count, num_records)
    return np.sort(np.array(random.Random(seed).sample(range(num_records), count), dtype=np.int64))


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lstrip(".").lower()


def _file_source(path: str, image_folder: str | None, sampling: str = "all") -> Source:
    kind = _suffix(path)
    refuse_foreign_directory(path)
    if kind in SHARD_KINDS or os.path.isdir(path):
        raise DataError(
            f"{path}: shards are read by a training run alone, as its only --data_path. To check them as well, or mix "
            f"them with other files: {conversion_of(path)}"
        )
    if os.path.isfile(path) and path.lower().endswith(TABLE_SUFFIXES):
        raise DataError(f"{path} is a table, which is converted first: {conversion_of(path)}")
    if kind not in READERS:
        known = ", ".join([*READERS, *MIXTURES, *SHARD_KINDS])
        raise DataError(f"{path}: unknown format {kind!r}; known: {known}.")
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such annotation file.")
    return Source(path, kind, image_folder, sampling)


def _mixture_sources(path: str, image_folder: str | None) -> list[Source]:
    """Return the files that a YAML mixture names; paths are relative to the working folder, else to the YAML."""
    import yaml

    try:
        with open(path, encoding="utf-8-sig") as file:
            mixture = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    entries = mixture.get("datasets") if isinstance(mixture, dict) else None
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: expected a list `datasets` of {{json_path, sampling_strategy, image_folder}}.")
    return [_mixture_entry(entry, path, image_folder) for entry in entries]


def _mixture_entry(entry, mixture_path: str, image_folder: str | None) -> Source:
    known = ("json_path", "sampling_strategy", "image_folder")
    if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str) or set(entry) - set(known):
        raise DataError(f"{mixture_path}: entry {entry!r} of `datasets`; expected the keys {', '.join(known)}.")
    path = entry["json_path"]
    beside = os.path.join(os.path.dirname(mixture_path), path)
    sampling = str(entry.get("sampling_strategy", "all")).strip()
    sample_positions(sampling, 1)
    folder = entry.get("image_folder", image_folder)
    return _file_source(beside if not os.path.exists(path) and os.path.exists(beside) else path, folder, sampling)


def open_sources(data_path: str | Sequence[str], image_folder: str | None = None) -> list[Source]:
    """Return the files behind one path or many; a YAML mixture stands for the files it names."""
    paths = [data_path] if isinstance(data_path, (str, os.PathLike)) else list(data_path)
    sources = []
    for path in map(os.fspath, paths):
        if _suffix(path) in MIXTURES:
            if not os.path.isfile(path):
                raise DataError(f"{path}: no such mixture file.")
            sources += _mixture_sources(path, image_folder)
        else:
            sources.append(_file_source(path, image_folder))
    if not sources:
        raise DataError("no annotation file given; name one with --data_path.")
    return sources
