"""Read the TSV files of MMBench and write the sheets that its server takes, without guesses about what a cell is."""

from __future__ import annotations

import base64
import csv
import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# LLaVA reads the files with pandas, for which a cell with one of these is empty: options end there.
EMPTY = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A"}
EMPTY |= {"NA", "NULL", "NaN", "None", "n/a", "nan", "null"}


def is_empty(value: Any) -> bool:
    """Return whether a cell is empty: nothing, or a word that pandas or LLaVA takes for nothing (none, NA ...)."""
    return value is None or str(value) in EMPTY or str(value).lower() in ("none", "nan")


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the lines of a TSV file with its header as keys; every cell is the text that stands in the file.

    Raises ValueError if one of `columns` is missing, and for a line that has more or fewer cells than the header.
    """
    with open(path, encoding="utf-8-sig", newline="") as file, long_cells():
        lines = csv.reader(file, delimiter="\t")
        header = next(lines, [])
        missing = [column for column in columns if column not in header]
        if missing:
            raise ValueError(
                f"{path} has the columns {', '.join(header) or 'none'}; {', '.join(missing)} is missing. Expected a "
                "TSV file of MMBench."
            )
        rows = []
        for cells in lines:
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}, line {lines.line_num} has {len(cells)} cells, the header {len(header)}. The file may be "
                    "cut; download it again."
                )
            rows.append(dict(zip(header, cells, strict=True)))
        return rows


@contextmanager
def long_cells():
    """Let the csv module read images, which are longer than the cells that it allows."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def decode_image(text: str) -> bytes:
    """Return the bytes of an image in base64; ValueError for another text."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"its image is no base64 ({error}): {text[:40]!r}...") from error


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows of equal keys as TSV, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        lines = csv.writer(file, delimiter="\t", lineterminator="\n")
        lines.writerow(rows[0])
        lines.writerows(row.values() for row in rows)
    return path


def write_sheet(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write rows of equal keys as xlsx, and return [path]; print what to install and return [] without openpyxl."""
    try:
        from openpyxl import Workbook
        from openpyxl.cell import WriteOnlyCell
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError:
        print(f"{path.name} is not written: pip install openpyxl and run again, which asks nothing twice.")
        return []
    book = Workbook(write_only=True)
    sheet = book.create_sheet()

    def to_cell(value):
        # Control characters have no place in xlsx, and an answer that begins with = is no formula.
        text = isinstance(value, str)
        cell = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", value) if text else value)
        if text:
            cell.data_type = "s"
        return cell

    sheet.append(list(rows[0]))
    for row in rows:
        sheet.append([to_cell(value) for value in row.values()])
    book.save(path)
    return [path]
