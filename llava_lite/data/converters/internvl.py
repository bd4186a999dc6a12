"""Turn the meta file of InternVL, {name: {root, annotation, repeat_time}}, into objects of all its data sets.

Like InternVL, this puts `<image>` and a newline before the first question of a record without placeholders.
"""

import os
from collections.abc import Iterator

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.conversation.layout import put_images_first
from llava_lite.data.converters.base import Options
from llava_lite.data.errors import DataError
from llava_lite.data.index.scan import parse_json, scan_json, scan_lines
from llava_lite.data.records.media import count_images, find_media


def read_internvl(data: dict, path: str, options: Options) -> Iterator[tuple[str, int, dict]]:
    """Yield (annotation file, position, object); image paths are relative to --image_folder, by default here."""
    for name, entry in data.items():
        annotation = _existing(entry["annotation"], path, name)
        if entry.get("repeat_time", 1) != 1:
            options.remarks.append(
                f"repeat_time {entry['repeat_time']} of {name!r} is not applied; use a YAML mixture"
            )
        root = os.path.relpath(entry.get("root") or ".", options.image_folder or ".")
        spans = (scan_lines if annotation.endswith(".jsonl") else scan_json)(annotation)
        with open(annotation, "rb") as stream:
            for position, (start, stop) in enumerate(spans.tolist()):
                stream.seek(start)
                try:
                    item = parse_json(stream.read(stop - start))
                except ValueError as error:
                    item = {"_reason": f"{annotation}[{position}]: not JSON: {error}."}
                yield annotation, position, _rooted(item, "" if root == "." else f"{root}/")


def _existing(annotation: str, path: str, name: str) -> str:
    beside = os.path.join(os.path.dirname(path), annotation)
    found = next((place for place in (annotation, beside) if os.path.isfile(place)), None)
    if found is None:
        raise DataError(f"{path}: the annotation file {annotation!r} of {name!r} does not exist.")
    return found


def _rooted(item, root: str):
    count = count_images(item) if isinstance(item, dict) else 0
    if not count:
        return item
    image = item.get("image")
    if image:
        item = item | {"image": [root + one for one in image] if isinstance(image, list) else root + str(image)}
    item = item | {key: root + item[key] for key in find_media(item) if isinstance(item[key], str)}
    turns = item.get("conversations")
    if isinstance(turns, list) and turns and DEFAULT_IMAGE_TOKEN not in str(turns):
        first = next(
            (k for k, turn in enumerate(turns) if isinstance(turn, dict) and turn.get("from") == "human"), None
        )
        if first is not None:
            turns = [*turns]
            turns[first] = turns[first] | {"value": put_images_first(str(turns[first]["value"]), count)}
            item["conversations"] = turns
    return item
