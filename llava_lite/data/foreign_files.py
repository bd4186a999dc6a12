"""Turn a file or directory that holds no records of ours into an error that names what it is and what converts it."""

import json
import os
from pathlib import Path

from llava_lite.data.record_content import read_content
from llava_lite.data.record_formats import ForeignRecord
from llava_lite.data.scan import DataError

# What only the command reads.
TABLE_SUFFIXES = (".csv", ".tsv")


def conversion_of(path: str, options: str = "") -> str:
    """Return the command that converts a file or directory."""
    out = Path(path).with_suffix("").name or "records"
    return " ".join(f"llava-lite data convert {path} {out}_llava.json {options}".split())


def foreign_file_error(path: str, error: ForeignRecord) -> DataError:
    """Return the error for a file whose records are of a format that is converted first."""
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
    if not isinstance(item, dict):
        return
    try:
        read_content(item, f"{os.path.basename(path)} ({os.path.basename(path)}[0])")
    except ForeignRecord as error:
        raise foreign_file_error(path, error) from None
    except DataError:
        return


def refuse_foreign_directory(path: str) -> None:
    """Raise DataError that says what a local directory without shards holds, and what converts or names it."""
    if "://" in path or not os.path.isdir(path):
        return
    names = sorted(os.listdir(path))
    if any(name in ("metadata.csv", "metadata.jsonl", "metadata.tsv") for name in names):
        raise DataError(
            f"{path} is an ImageFolder (metadata beside its images), which is converted first: {conversion_of(path)}"
        )
    annotations = [name for name in names if name.endswith((".json", ".jsonl"))]
    if annotations:
        raise DataError(
            f"{path} is a directory without shards; name its annotation files one by one: "
            f"{', '.join(os.path.join(path, name) for name in annotations[:5])}."
        )
