"""Turn a table (CSV or TSV) of images with captions, or of questions and answers, into objects."""

import csv
from collections.abc import Iterator

from llava_lite.data.converters.base import Options
from llava_lite.data.errors import DataError
from llava_lite.data.records.formats import ANSWER_KEYS, CAPTION_KEYS
from llava_lite.data.records.keys import FILE_KEYS, IMAGE_KEYS

KNOWN = {
    *CAPTION_KEYS,
    *ANSWER_KEYS,
    *IMAGE_KEYS,
    *FILE_KEYS,
    "question",
    "instruction",
    "output",
    "query",
    "response",
}
# A caption may be a page of text.
MAX_FIELD_BYTES = 2**26


def read_table(path: str, options: Options) -> Iterator[tuple[int, dict]]:
    """Yield the number of each line and its object, by the names of the header or of --columns."""
    csv.field_size_limit(MAX_FIELD_BYTES)
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t" if path.lower().endswith(".tsv") else ",", strict=True)
        try:
            first = next(rows, [])
            names = options.columns or [name.strip() for name in first]
            if options.columns is None and not KNOWN & set(names) and not set(options.image_key or ()) & set(names):
                raise DataError(
                    f"{path} has the columns {', '.join(map(repr, first)) or '(none)'}, none of which is known; if "
                    "it has no header, name them: --columns image caption. URLs are not downloaded: img2dataset makes "
                    "tar files of them, which training reads."
                )
            if options.columns is not None:
                yield 0, _object(first, names, path, 0)
            for position, row in enumerate(rows, start=options.columns is not None):
                if row:
                    yield position, _object(row, names, path, position)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {rows.line_num}: {error}.") from None


def _object(row: list[str], names: list[str], path: str, position: int) -> dict:
    if len(row) != len(names):
        return {"_reason": f"{path}[{position}] has {len(row)} fields, expected {len(names)}: {', '.join(names)}."}
    return {name: value for name, value in zip(names, row, strict=True) if value != ""}
