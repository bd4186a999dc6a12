"""Write a text into the file that a person names: a regular file at once, a pipe or a device as it is."""

import os
import stat
import sys
from contextlib import suppress
from pathlib import Path

from llava_lite.errors import named_disk_errors

ADVICE = "Make room there, or name another file."
# How a text is written as UTF-8: a lone surrogate has no bytes, and JSON reads its escape (\ud800) back.
ESCAPED = "backslashreplace"


def write_output(path: str | os.PathLike, text: str, example: str) -> None:
    """Write `text` into the file `path`, and make its directory.

    A regular file is replaced when the new one is complete: a reader finds the old text or the new one. A link stays,
    and its target is replaced. A pipe or a device, such as /dev/stdout, stays too and gets the text. example: a name
    for a file, for the message where `path` is a directory. OSError names `path` as it was given, and leaves no draft.
    """
    status = _get_status(path)
    if status is not None and stat.S_ISDIR(status.st_mode):
        inside = os.path.join(path, example)
        raise IsADirectoryError(f"{os.fspath(path)!r} is a directory; name a file, such as {inside!r}.")
    data = text.encode("utf-8", ESCAPED)
    with named_disk_errors(path, ADVICE, len(data)):
        number = None if status is None else _own_stream(status)
        if number is not None:
            with open(number, "wb", closefd=False) as file:
                file.write(data)
        elif status is not None and not stat.S_ISREG(status.st_mode):
            Path(path).write_bytes(data)
        else:
            _replace(Path(os.path.realpath(path)), data)


def can_be_named(path: str | os.PathLike) -> bool:
    """Return whether a file can have a path: not one with a NUL, or with a lone surrogate, which has no bytes."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _get_status(path) -> os.stat_result | None:
    """Return the status of what a path leads to, None if there is nothing."""
    if not can_be_named(path):
        raise OSError(f"no file can have the name {os.fspath(path)!r}: it holds a NUL or a lone surrogate.")
    try:
        return os.stat(path)
    except OSError:
        return None


def _own_stream(status: os.stat_result) -> int | None:
    """Return 1 or 2 for the file that this process prints into, with all in it that was printed so far; else None.

    If that is a regular file, another handle would write over what was printed, and a new file would lose it.
    """
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        with suppress(OSError):
            if stream is not None and os.path.samestat(status, os.fstat(number)):
                stream.flush()
                return number
    return None


def _replace(path: Path, data: bytes) -> None:
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        draft.write_bytes(data)
        os.replace(draft, path)
    finally:
        # Without the error of the removal in place of the first one.
        with suppress(OSError):
            draft.unlink()
