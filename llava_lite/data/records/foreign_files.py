"""Explain why a file or directory cannot be read as records: its format, and the command that converts it."""

import json
import os
from pathlib import Path

from llava_lite.data.errors import DataError
from llava_lite.data.records.content import read_content, without_nulls
from llava_lite.data.records.formats import FORMATS, ForeignRecord, get_formats

# Read only by `llava-lite data convert`, but for caption files (index/captions.py).
TABLE_SUFFIXES = (".csv", ".tsv")
# A file is parsed as a whole, to name its format, only up to this size.
LARGEST_BYTES = 2**26


def get_conversion(path: str, options: str = "") -> str:
    """Return the command that converts a file or directory."""
    out = Path(path).with_suffix("").name or "records"
    return " ".join(f"llava-lite data convert {path} {out}_llava.json {options}".split())


def foreign_file_error(path: str, error: ForeignRecord) -> DataError:
    """Return the error for a file of records that must be converted, or are not supported."""
    if error.options is None:
        return DataError(f"{path} is of the format {error.format_name!r}, which is not supported: {error.reason}.")
    return DataError(
        f"{path} is of the format {error.format_name!r}; convert it first: {get_conversion(path, error.options)}"
    )


def check_no_foreign_file(path: str) -> None:
    """Raise DataError with the command that converts it, if a JSON file is one object of a known format."""
    if os.path.getsize(path) > LARGEST_BYTES:
        return
    try:
        with open(path, "rb") as file:
            item = json.load(file)
    except (ValueError, RecursionError):
        return
    if isinstance(item, list) and item and all(isinstance(one, list) for one in item):
        raise DataError(
            f"{path} has lists of records (Qwen-VL's packed data); convert it first: {get_conversion(path)}"
        )
    if not isinstance(item, dict):
        return
    if isinstance(item.get("data"), list):
        raise DataError(f"{path} has its records under 'data'; convert it first: {get_conversion(path)}")
    found = get_formats(without_nulls(item))
    if not found or FORMATS[found[0]].read is not None:
        return
    try:
        read_content(item, f"{os.path.basename(path)} ({os.path.basename(path)}[0])")
    except ForeignRecord as error:
        raise foreign_file_error(path, error) from None


def check_no_foreign_directory(path: str) -> None:
    """Raise DataError for a local directory without shards, with its content and what to do."""
    if "://" in path or not os.path.isdir(path):
        return
    names = {name for _, _, names in os.walk(path) for name in names}
    if names & {"metadata.csv", "metadata.jsonl", "metadata.tsv"}:
        raise DataError(
            f"{path} is an ImageFolder (metadata beside its images); convert it first: {get_conversion(path)}"
        )
    if any(name.lower().endswith((".tar", ".parquet", ".arrow")) for name in names):
        return
    annotations = sorted(name for name in os.listdir(path) if name.endswith((".json", ".jsonl")))
    if annotations:
        raise DataError(
            f"{path} is a directory without shards; name its annotation files one by one: "
            f"{', '.join(os.path.join(path, name) for name in annotations[:5])}."
        )
    raise DataError(
        f"{path} is a directory without shards and without annotations. Images in directories named after classes "
        "have no captions to train on: write a metadata.csv with the columns file_name and text, and convert it: "
        f"{get_conversion(path)}"
    )
