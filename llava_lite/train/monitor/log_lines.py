"""Read the files of lines that a run writes, metrics.jsonl and its like, however they were damaged."""

import json
import math
from pathlib import Path
from typing import NamedTuple

METRICS, GENERATIONS = "metrics.jsonl", "generations.jsonl"
# No float32 number of a run that means anything is larger, and axes overflow near the end of float64.
LARGEST = 1e30
# Up to here a float is any integer exactly.
LARGEST_STEP = 2**53


class FileState(NamedTuple):
    """What a file holds; fault: what is wrong with it, in a clause after its name, None for a good one."""

    content: object
    fault: str | None
    is_missing: bool = False


def json_safe(value):
    """Return `value` with numbers that JSON lacks written as text."""
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def is_number(value) -> bool:
    """Tell whether a value of a log is a number that can be drawn and averaged: finite, and LARGEST at most."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


def as_step(value) -> int | None:
    """Return a number of steps or ranks as an integer, None for what is none."""
    return int(value) if is_number(value) and 0 <= value < LARGEST_STEP and value == int(value) else None


def with_steps(lines) -> list[dict]:
    """Return the lines of a log that say at which step they were written."""
    return [line | {"step": step} for line in lines if isinstance(line, dict) and (step := get_step(line)) is not None]


def get_step(line) -> int | None:
    """Return the step of a line of a log, None without one."""
    return as_step(line["step"]) if isinstance(line.get("step"), int) else None


def read_metrics(path):
    """Return the lines of a metrics.jsonl, or of another log; one that a crash cut short ends the list."""
    path = Path(path)
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def read_bytes(path: Path) -> FileState:
    """Return the bytes of a file, none for one that is missing, cannot be read, or is a device or a pipe."""
    if path.exists() and not path.is_file() and not path.is_dir():
        # It may never end.
        return FileState(b"", "cannot be read (it is a device or a pipe)")
    try:
        return FileState(path.read_bytes(), None)
    except FileNotFoundError:
        return FileState(b"", "is missing", is_missing=True)
    except OSError as error:
        return FileState(b"", f"cannot be read ({error.strerror or error})")


def read_object(path: Path) -> FileState:
    """Return the JSON object of a file, {} for one that is missing, damaged or cannot be read."""
    text, fault, is_missing = read_bytes(path)
    if fault:
        return FileState({}, fault, is_missing)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        return FileState({}, f"is damaged (no JSON: {error})")
    if not isinstance(found, dict):
        return FileState({}, f"is damaged (it holds a {type(found).__name__}, expected an object)")
    return FileState(found, None)


def read_lines(path: Path) -> FileState:
    """Return the JSON objects of a file of lines, [] for a missing one; what is damaged is left out and counted.

    A last line without its end is being written, and is no damage.
    """
    text, fault, is_missing = read_bytes(path)
    found, bad, texts = [], [], text.split(b"\n")
    for i, one in enumerate(texts):
        if not one.strip():
            continue
        try:
            line = json.loads(one)
        except (ValueError, RecursionError):
            line = None
            if i == len(texts) - 1:
                continue
        if isinstance(line, dict):
            found.append(line)
        else:
            bad.append(i + 1)
    if bad:
        lines = f"line {bad[0]:,}" if len(bad) == 1 else f"{len(bad):,} lines, the first of them line {bad[0]:,}"
        fault = f"is damaged (no JSON object, and left out: {lines})"
    return FileState(found, fault, is_missing)
