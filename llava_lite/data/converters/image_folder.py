"""Turn an ImageFolder of `datasets` (metadata.jsonl, .csv or .tsv beside its images) into objects.

Paths are relative to the metadata file; here they become relative to the directory given to the command.
"""

import os
from collections.abc import Iterator

from llava_lite.data.converters.base import Options
from llava_lite.data.converters.tables import read_table
from llava_lite.data.errors import DataError
from llava_lite.data.index.scan import parse_json, scan_lines
from llava_lite.data.records.media import find_media

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv")


def read_image_folder(path: str, options: Options) -> Iterator[tuple[str, int, dict]]:
    """Yield (file, position, object) of every line of metadata; its image is under `image`."""
    files = sorted(
        os.path.join(place, name) for place, _, names in os.walk(path) for name in names if name in METADATA
    )
    if not files:
        raise DataError(
            f"{path} holds no {' or '.join(METADATA)}. Directories named after classes have no captions to train "
            "on: write a metadata.csv with the columns file_name and text."
        )
    for file in files:
        below = os.path.relpath(os.path.dirname(file), path)
        for position, item in _lines(file, options):
            yield file, position, _with_path(item, "" if below == "." else f"{below}/")


def _lines(file: str, options: Options) -> Iterator[tuple[int, dict]]:
    if not file.endswith(".jsonl"):
        yield from read_table(file, options)
        return
    with open(file, "rb") as stream:
        for position, (start, stop) in enumerate(scan_lines(file).tolist()):
            stream.seek(start)
            try:
                yield position, parse_json(stream.read(stop - start))
            except ValueError as error:
                yield position, {"_reason": f"{file}[{position}]: not JSON: {error}."}


def _with_path(item: dict, below: str) -> dict:
    if not isinstance(item, dict) or "_reason" in item:
        return item
    keys = [key for key in ("file_name", "file_names", "image", "images") if item.get(key)]
    media = {key: below + item[key] for key in find_media(item) if isinstance(item[key], str)}
    if media and not keys:
        return item | media
    if not keys:
        return {"_reason": f"a line of metadata names no file: it has {', '.join(item)}, expected file_name."}
    names = item[keys[0]]
    image = [below + name for name in names] if isinstance(names, list) else below + str(names)
    return {key: value for key, value in item.items() if key not in keys} | {"image": image} | media
