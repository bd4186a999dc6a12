"""Turn a file or directory that holds no records of ours into an error that names what it is and what converts it."""

import json
import os
from pathlib import Path

from llava_lite.data.record_content import read_content, without_nulls
from llava_lite.data.record_formats import FORMATS, ForeignRecord, formats_of
from llava_lite.data.scan import DataError

# What only the command reads.
TABLE_SUFFIXES = (".csv", ".tsv")


def conversion_of(path: str, options: str = "") -> str:
    """Return the command that converts a file or directory."""
    out = Path(path).with_suffix("").name or "records"
    return " ".join(f"llava-lite data convert {path} {out}_llava.json {options}".split())


def foreign_file_error(path: str, error: ForeignRecord) -> DataError:
    """Return the error for a file whose records are of a format that is converted first, or not read at all."""
    if error.options is None:
        return DataError(f"{path} is of the format {error.format_name!r}, which is not supported: {error.reason}.")
    return DataError(
        f"{path} is of the format {error.format_name!r}, which is converted first: "
        f"{conversion_of(path, error.options)}"
    )


def refuse_foreign_file(path: str) -> None:
    """Raise DataError with the command that converts it, if a JSON file is one object of a format that we know."""
    try:
        with open(path, "rb") as file:
            item = json.load(file)
    except ValueError:
        return
    if isinstance(item, list) and item and all(isinstance(one, list) for one in item):
        raise DataError(
            f"{path} holds lists of records (Qwen-VL's packed data), to be taken apart first: {conversion_of(path)}"
        )
    if not isinstance(item, dict):
        return
    if isinstance(item.get("data"), list):
        raise DataError(f"{path} holds its records under 'data', and is converted first: {conversion_of(path)}")
    found = formats_of(without_nulls(item))
    if not found or FORMATS[found[0]].read is not None:
        return
    try:
        read_content(item, f"{os.path.basename(path)} ({os.path.basename(path)}[0])")
    except ForeignRecord as error:
        raise foreign_file_error(path, error) from None


def refuse_foreign_directory(path: str) -> None:
    """Raise DataError that says what a local directory without shards holds, and what converts or names it."""
    if "://" in path or not os.path.isdir(path):
        return
    names = {name for _, _, names in os.walk(path) for name in names}
    if names & {"metadata.csv", "metadata.jsonl", "metadata.tsv"}:
        raise DataError(
            f"{path} is an ImageFolder (metadata beside its images), which is converted first: {conversion_of(path)}"
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
        "have no captions to learn from: write a metadata.csv with the columns file_name and text, and convert it: "
        f"{conversion_of(path)}"
    )
