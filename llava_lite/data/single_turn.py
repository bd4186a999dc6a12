"""Turn conversations of several questions into records of one question and its answer each.

After LLaMA2-Accessory's tools/llava_to_single_turn.py, whose only way is `drop` here: it deletes line breaks, so that
words around them are joined. Image placeholders are taken out of the texts; `preprocess: single_turn_llava` of a META
file puts the image of each record before its question.
"""

import json
import os
from typing import Literal

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.data.errors import DataError
from llava_lite.data.records.image_values import describe

NEWLINES = ("keep", "space", "drop")


def single_turn(records: list[dict], newlines: Literal["keep", "space", "drop"] = "keep") -> list[dict]:
    """Return a record of each question and its answer, with the other keys of its record.

    records: in LLaVA's format. newlines: in the texts of both turns they stay, become spaces, or are deleted (the
    original's output, object by object). A last question without an answer is left out. Raises DataError with the
    position of a record that has no conversation.
    """
    if newlines not in NEWLINES:
        raise ValueError(f"unknown newlines {newlines!r}; known: {', '.join(NEWLINES)}.")
    pairs = []
    for position, record in enumerate(records):
        turns = record.get("conversations") if isinstance(record, dict) else None
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            what = describe(turns if isinstance(record, dict) else record)
            raise DataError(f"record {position}: 'conversations' is {what}, expected a list of turns.")
        for start in range(0, len(turns) - 1, 2):
            pair = [_cleaned(turn, newlines) for turn in turns[start : start + 2]]
            pairs.append(record | {"conversations": pair})
    return pairs


def _cleaned(turn: dict, newlines: str) -> dict:
    return {key: _text(value, newlines) if isinstance(value, str) else value for key, value in turn.items()}


def _text(text: str, newlines: str) -> str:
    if newlines == "drop":
        return text.replace(DEFAULT_IMAGE_TOKEN, "").replace("\n", "")
    for placeholder in (f"{DEFAULT_IMAGE_TOKEN}\n", f"\n{DEFAULT_IMAGE_TOKEN}", DEFAULT_IMAGE_TOKEN):
        text = text.replace(placeholder, "")
    return text.replace("\n", " ") if newlines == "space" else text


def convert_file(path: str, out: str, newlines: str = "keep") -> tuple[int, int]:
    """Write the single-turn records of a JSON or JSON-lines file to another; return how many were read and written.

    The JSON is written as the original writes it: on one line, in ASCII. Raises DataError for a file that exists
    already or has no list of records.
    """
    if os.path.exists(out):
        raise DataError(f"{out} exists already; name another file.")
    records = _read(path)
    try:
        pairs = single_turn(records, newlines)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    text = "".join(f"{json.dumps(pair)}\n" for pair in pairs) if out.endswith(".jsonl") else json.dumps(pairs)
    with open(out, "w", encoding="utf-8") as file:
        file.write(text)
    return len(records), len(pairs)


def _read(path: str) -> list:
    is_lines = path.endswith(".jsonl")
    with open(path, encoding="utf-8-sig") as file:
        try:
            records = [json.loads(line) for line in file if line.strip()] if is_lines else json.load(file)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not JSON: {error}.") from None
    if not isinstance(records, list):
        raise DataError(f"{path} holds {describe(records)}, expected a list of records.")
    return records
