"""Turn annotation files of several formats into Records: who says what, and about which pictures.

The record is LLaVA's, `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}`; the YAML mixture is
LLaVA-NeXT's. A new format is a `Reader` and one line in READERS.
"""

import json
import math
import os
import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.data.scan import DataError, scan_json, scan_lines

ROLES = ("human", "gpt")


class Record(NamedTuple):
    """One conversation. `images` are paths below `image_folder`, in the order of their <image> placeholders."""

    id: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]  # ("human" | "gpt", text), human first, alternating
    where: str = ""  # "train.json[17]": the file and the position, counted from 0
    image_folder: str | None = None
    system: str | None = None  # replaces the system text of the template; None keeps that
    not_supervised: frozenset[int] = frozenset()  # positions in `turns` of answers that carry no labels

    @property
    def name(self) -> str:
        """Words that let a person find this record."""
        return f"record {self.id!r} ({self.where})"


def _kind(value) -> str:
    return f"{type(value).__name__} {value!r}" if not isinstance(value, (dict, list)) else type(value).__name__


def _record_id(item: dict, where: str) -> str:
    """Return the id as a string: public files hold numbers too; a record without one is known by its place."""
    value = item.get("id")
    if value is None:
        return where
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{where}: 'id' is {_kind(value)}, expected a string or a number.")
    return str(int(value)) if value == int(value) else str(value)


def _images(item: dict, name: str) -> tuple[str, ...]:
    if item.get("video") is not None:
        raise DataError(f"{name} has a 'video'; videos are not supported. Remove the record or extract its frames.")
    value = item.get("image")
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    for path in values:
        if not isinstance(path, str) or not path:
            raise DataError(f"{name}: 'image' holds {_kind(path)}, expected a path. Leave the key out if it has none.")
    return tuple(values)


def _text(value, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name}: the 'value' of a turn is {_kind(value)}, expected a string.")
    try:
        # JSON may hold half of a surrogate pair ("\ud83d"); no tokenizer takes that.
        _ = value.isascii() or value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name}: the text holds {value[error.start]!r}, half of a surrogate pair.") from None
    return value


def _turns(item: dict, name: str) -> tuple[tuple[str, str], ...]:
    """Return the turns from the first human one on; like LLaVA, drop one that the model says before being asked."""
    conversation = item.get("conversations")
    if conversation == []:
        raise DataError(f"{name}: 'conversations' is empty, expected a list of turns, the first from 'human'.")
    if not isinstance(conversation, list):
        raise DataError(f"{name}: 'conversations' is {_kind(conversation)}, expected a list of turns.")
    turns = []
    for turn in conversation:
        if not isinstance(turn, dict):
            raise DataError(f"{name}: a turn is {_kind(turn)}, expected an object with 'from' and 'value'.")
        if turn.get("from") not in ROLES:
            raise DataError(f"{name}: a turn is from {turn.get('from')!r}, expected 'human' or 'gpt'.")
        turns.append((turn["from"], _text(turn.get("value"), name)))
    if turns[0][0] == "gpt":
        turns = turns[1:]
    for position, (role, _) in enumerate(turns):
        if role != ROLES[position % 2]:
            raise DataError(
                f"{name}: turn {position} is from {role!r}, expected {ROLES[position % 2]!r}: human and gpt alternate."
            )
    if not turns:
        raise DataError(f"{name} holds only one turn from gpt, which is dropped; nothing remains.")
    return tuple(turns)


def parse_record(item: dict, where: str, image_folder: str | None = None) -> Record:
    """Return the Record of one LLaVA-style object.

    `<image>` in a record without pictures is plain text, as in LLaVA. With pictures, marks and pictures must be as
    many: LLaVA drops what is too much, or crashes in the middle of an epoch.
    Raises DataError naming the record and its place.
    """
    if not isinstance(item, dict):
        raise DataError(f"{where} is {_kind(item)}, expected an object with 'conversations'.")
    record_id = _record_id(item, where)
    name = f"record {record_id!r} ({where})"
    images = _images(item, name)
    turns = _turns(item, name)
    num_marks = sum(text.count(DEFAULT_IMAGE_TOKEN) for _, text in turns)
    if images and num_marks != len(images):
        advice = "Remove a mark or add a picture." if num_marks > len(images) else "Add a mark or remove a picture."
        raise DataError(
            f"{num_marks} {DEFAULT_IMAGE_TOKEN} marks in the conversation but {len(images)} pictures in {name}. "
            f"{advice}"
        )
    return Record(record_id, images, turns, where, image_folder)


def parse_json_record(data: bytes, where: str, image_folder: str | None = None) -> Record:
    """Return the Record of one JSON object in bytes; a syntax error stays json's own, for the caller to place."""
    return parse_record(json.loads(data), where, image_folder)


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
SHARD_KINDS = ("tar", "parquet")


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
    if kind in SHARD_KINDS:
        raise DataError(f"{path}: shards are read by a training run alone, as its only --data_path.")
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
