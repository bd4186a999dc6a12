"""Turn an error into the sentence that a person reads in the terminal."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path


class DiskError(OSError):
    """A file or directory could not be written; the message names it, the bytes needed and free, and what to do."""


@contextmanager
def named_disk_errors(path, advice: str, needed_bytes: int | None = None):
    """Raise DiskError for an OSError of the block, which writes to `path`; a DiskError passes as it is."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        named = DiskError(describe_disk_error(error, path, advice, needed_bytes))
        named.errno = error.errno
        raise named from error


def describe_disk_error(error: OSError, path, advice: str, needed_bytes: int | None = None) -> str:
    """Return the sentence for a failure to write to `path`: the reason, the bytes needed and free, the advice."""
    needs = "" if needed_bytes is None else f"; {needed_bytes:,} bytes are needed"
    return f"{path} cannot be written: {error.strerror or error}{needs}{get_free_space(path)}. {advice}"


def get_free_space(path) -> str:
    """Return how many bytes are free on the disk of a path that need not exist, "" where that cannot be told."""
    path = Path(path).absolute()
    directory = next((one for one in (path, *path.parents) if os.path.isdir(one)), None)
    try:
        return f", {shutil.disk_usage(directory).free:,} bytes are free in {directory}"
    except (OSError, TypeError):
        return ""


def get_sentence(error: BaseException) -> str:
    """Return the message of an error; an OSError that names its file in a field alone gets the file in front."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{str(error.filename)!r}: {error.strerror}."
    return str(error) or type(error).__name__
