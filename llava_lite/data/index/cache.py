"""Cache facts about data on disk: files written atomically, by one process at a time, named by their key.

Ranks need no collective for this: the first holds the lock and works, the others find the result.
"""

import hashlib
import logging
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from llava_lite.errors import DiskError, named_disk_errors

logger = logging.getLogger(__name__)

OTHER_PLACE = "ame another directory: LLAVA_LITE_CACHE for indexes, --feature_cache for features."
ADVICE = f"Make room there, or n{OTHER_PLACE}"
# An array file ends with these bytes and the CRC-32 of all bytes before them; NumPy ignores what follows an array.
MARK = b"\0crc-32\0"
_PIECE_BYTES = 1 << 22
# By the version of NumPy's format: arrays without names in Unicode have these.
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# The array files that this process has compared with their checksums, as they were: path -> what `stat` said.
_compared = {}


class DamagedArray(ValueError):
    """An array file whose bytes are not those that were written."""


def cache_root(cache_dir: str | None = None) -> Path:
    """Return the directory of all indexes, made if absent: `cache_dir`, $LLAVA_LITE_CACHE or ~/.cache/llava_lite."""
    chosen = cache_dir or os.environ.get("LLAVA_LITE_CACHE") or "~/.cache/llava_lite"
    advice = "Set LLAVA_LITE_CACHE to a directory that you may write."
    try:
        root = Path(chosen).expanduser()
        root.mkdir(parents=True, exist_ok=True)
    # RuntimeError: a `~` or `~name` that is nobody's home. ValueError: a lone surrogate or a NUL.
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(f"cannot make the index directory {chosen!r}: {error}. {advice}") from None
    return root


def get_key(*parts) -> str:
    """Return a key for the text of the parts, equal on every machine."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(str(len(data)).encode() + b":" + data)
    return digest.hexdigest()[:24]


def file_key(path: str) -> str:
    """Return a key for a file as it is now: of its path, size, modification time and change time.

    A copy that keeps the modification time (`cp -p`, `rsync -t`) has another change time: nobody can set that.
    """
    status = os.stat(path)
    return get_key(os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@contextmanager
def locked(path: Path, purpose: str) -> Iterator[None]:
    """Hold the lock of `path`; log once a minute while another process holds it."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{path}.lock")
    start = time.monotonic()
    while True:
        try:
            with _named_errors(lock.lock_file):
                lock.acquire(timeout=60)
            break
        except Timeout:
            waited_s = time.monotonic() - start
            logger.info("waiting for another process to %s (%d s so far)", purpose, waited_s)
    try:
        yield
    finally:
        lock.release()


def make_directory(path: Path) -> None:
    """Make a directory and those above it; DiskError if that cannot be done."""
    with _named_errors(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def _named_errors(path, needed_bytes: int | None = None):
    """Raise DiskError for an OSError of the block, which writes to `path`; its advice makes room, or the way free."""
    with named_disk_errors(path, ADVICE, needed_bytes):
        try:
            yield
        except IsADirectoryError as error:
            raise DiskError(in_its_place(path)) from error
        except (FileExistsError, NotADirectoryError) as error:
            raise DiskError(
                f"{path} cannot be made: a file is in its place, or in that of a directory above it. Remove that "
                f"file, or n{OTHER_PLACE}"
            ) from error


def in_its_place(path) -> str:
    """Return the sentence for a directory in the place of a file of the cache."""
    return f"{path} is a directory, and a file belongs in its place. Remove the directory: the file is made again."


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array with its checksum, atomically: a reader finds the old file or the new one.

    DiskError names the file, the bytes needed and those free.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}.part")
    with _named_errors(path, array.nbytes):
        try:
            with open(draft, "w+b") as file:
                np.save(file, array)
                file.seek(0)
                checksum = get_checksum(file, os.fstat(file.fileno()).st_size)
                file.write(MARK + checksum.to_bytes(4, "little"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)


def get_checksum(file, num_bytes: int) -> int:
    """Return the CRC-32 of the next `num_bytes` of a file, or of those that there are."""
    checksum = 0
    while num_bytes > 0 and (piece := file.read(min(num_bytes, _PIECE_BYTES))):
        checksum, num_bytes = zlib.crc32(piece, checksum), num_bytes - len(piece)
    return checksum


def load_array(path: Path) -> np.ndarray | None:
    """Return the array, memory-mapped and read-only; None if there is no file.

    Its bytes are compared with the checksum once in a process; DamagedArray if they differ. DiskError if it cannot be
    read at all.
    """
    try:
        # Opened once: another process may put a new file in its place at any time.
        with open(path, "rb") as file:
            _compare(path, file)
            file.seek(0)
            read_header = _READ_HEADER[np.lib.format.read_magic(file)]
            shape, is_fortran, dtype = read_header(file)
            array = np.memmap(file, dtype, "r", file.tell(), shape, "F" if is_fortran else "C")
        # A plain view: indexing a np.memmap takes a microsecond more.
        return array.view(np.ndarray)
    except FileNotFoundError:
        return None
    except IsADirectoryError as error:
        raise DiskError(in_its_place(path)) from error
    # NumPy raises EOFError for an empty file.
    except (ValueError, EOFError) as error:
        raise DamagedArray(f"{path} is damaged ({error}). Start again: it is made again.") from None
    except OSError as error:
        raise DiskError(f"{path} cannot be read: {error.strerror or error}. N{OTHER_PLACE}") from error


def _compare(path: Path, file) -> None:
    """Raise DamagedArray if the bytes of an open array file are not those that were written."""
    status = os.fstat(file.fileno())
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if _compared.get(os.fspath(path)) == state:
        return
    checksum = get_checksum(file, status.st_size - len(MARK) - 4)
    if file.read() != MARK + checksum.to_bytes(4, "little"):
        raise DamagedArray("its checksum differs")
    _compared[os.fspath(path)] = state


def load_undamaged(path: Path) -> np.ndarray | None:
    """Return the array like load_array; of a damaged file None, with a warning, for whoever makes it again."""
    try:
        return load_array(path)
    except DamagedArray as error:
        logger.warning("%s", str(error).replace("Start again: it", "It"))
        return None
