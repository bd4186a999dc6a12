"""Turn a file of questions into the examples of the page."""

from __future__ import annotations

import json
from pathlib import Path

# As many as fit on a page; of each image one.
NUM_EXAMPLES = 6
BESIDE_A_MODEL = "examples.jsonl"


def read_examples(file: str | Path) -> list[tuple[str, list[str]]]:
    """Return (text, paths of images) of the first questions about different images, different questions first.

    file: a JSON list, or one JSON object a line as `llava-lite answer` reads them: "text" (or "question"), and
    "image", a name or a list of names beside the file; without it a question about text. Raises ValueError for other
    content, or an image that is not there.
    """
    file, new, asked_before = Path(file), {}, {}
    for record in _records(file):
        fields = record if isinstance(record, dict) else {}
        text, image = fields.get("text", fields.get("question")), fields.get("image")
        names = [] if image is None else [image] if isinstance(image, str) else image
        if not isinstance(text, str) or not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            raise ValueError(
                f"{file}: an example is an object with a text in 'text' and an image or a list of images in 'image'; "
                f"got {json.dumps(record, ensure_ascii=False)[:80]}."
            )
        paths = tuple(str(file.parent / name) for name in names)
        missing = [path for path in paths if not Path(path).is_file()]
        if missing:
            raise ValueError(f"{file}: the image {missing[0]} of {text[:40]!r} is not there.")
        (asked_before if text in new.values() else new).setdefault(paths, text)
    found = asked_before | new
    return [(found[paths], list(paths)) for paths in dict.fromkeys([*new, *asked_before])][:NUM_EXAMPLES]


def find_examples(model_paths) -> Path | None:
    """Return the file of examples in the first of some model directories that has one."""
    files = (Path(path) / BESIDE_A_MODEL for path in model_paths)
    return next((file for file in files if file.is_file()), None)


def _records(file: Path) -> list:
    text = file.read_text(encoding="utf-8")
    try:
        is_list = text.lstrip().startswith("[")
        return json.loads(text) if is_list else [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}.") from error
