"""Read the caption files of LLaMA-Adapter V2 and ImageBind-LLM: TAB-separated lines of `url` and `caption`.

The originals read them with pandas, whose quotes may swallow the lines after them and whose empty captions are the
text "nan". Here one line is one record: quotes count only around a full field, and an empty caption is an error by its
line.
"""

import re
from typing import NamedTuple

import numpy as np

from llava_lite.data.errors import DataError
from llava_lite.data.index.scan import LineError, scan_lines, without_bom

CAPTION = "caption"
# The key of the image: a path below the image folder; an address is not downloaded.
IMAGES = ("image", "url")
READ = (CAPTION, *IMAGES, "id")


class Columns(NamedTuple):
    """The columns of a table, in order. runs: several tabs in a row count as one, as in the header."""

    names: tuple[str, ...]
    runs: bool = False

    @property
    def has_captions(self) -> bool:
        """Whether these are the columns of a caption file."""
        return CAPTION in self.names and any(name in self.names for name in IMAGES)


def read_columns(path: str) -> Columns:
    """Return the columns that the first line of a file names; DataError if it is not UTF-8 text."""
    with open(path, "rb") as file:
        line = next((line for line in file if without_bom(line).strip()), b"")
    try:
        text = without_bom(line).decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}). Save it as UTF-8.") from None
    first, *others = [_unquoted(name).lower() for name in text.split("\t")]
    # The documents of the originals write two tabs between the two names.
    return Columns((first, *filter(None, others)), runs="" in others)


def scan_rows(path: str) -> np.ndarray:
    """Return the byte spans [N, 2] of the lines after the header that are not empty."""
    return scan_lines(path)[1:]


def read_row(data: bytes, columns: Columns) -> dict:
    """Return the object {image or url, caption, id} of a line; LineError if it has other fields or an empty one."""
    text, num_columns = data.decode("utf-8").rstrip("\r\n"), len(columns.names)
    fields = text.split("\t")
    if columns.runs or len(fields) != num_columns:
        fields = re.split("\t+", text)
    if len(fields) != num_columns:
        raise LineError(
            f"{len(fields)} fields, expected {num_columns}, which tabs separate: {', '.join(columns.names)}. A "
            "caption holds no tab, and stands on one line."
        )
    named = dict(zip(columns.names, map(_unquoted, fields), strict=True))
    image = next(name for name in IMAGES if name in named)
    for name in (CAPTION, image):
        if not named[name]:
            raise LineError(f"the {name} is empty. Write it, or remove the line.")
    return {key: value for key, value in named.items() if key in (CAPTION, image, "id") and value}


def _unquoted(field: str) -> str:
    """Return a field without spaces around it, and without quotes if they are around all of it."""
    field = field.strip()
    inside = field[1:-1]
    is_quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inside.replace('""', "")
    return inside.replace('""', '"').strip() if is_quoted else field
