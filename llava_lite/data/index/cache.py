"""Cache facts about data on disk: files written atomically, by one process at a time, named by their key.

Ranks need no collective for this: the first holds the lock and works, the others find the result.
"""

import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)


def cache_root(cache_dir: str | None = None) -> Path:
    """Return the directory of all indexes, made if absent: `cache_dir`, $LLAVA_LITE_CACHE or ~/.cache/llava_lite."""
    chosen = cache_dir or os.environ.get("LLAVA_LITE_CACHE") or "~/.cache/llava_lite"
    root = Path(chosen).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        advice = "Set LLAVA_LITE_CACHE to a directory that you may write."
        raise OSError(f"cannot make the index directory {root}: {error}. {advice}") from None
    return root


def get_key(*parts) -> str:
    """Return a key for the text of the parts, equal on every machine."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(str(len(data)).encode() + b":" + data)
    return digest.hexdigest()[:24]


def file_key(path: str) -> str:
    """Return a key for a file as it is now: of its path, size and modification time."""
    status = os.stat(path)
    return get_key(os.path.realpath(path), status.st_size, status.st_mtime_ns)


@contextmanager
def locked(path: Path, purpose: str) -> Iterator[None]:
    """Hold the lock of `path`; log once a minute while another process holds it."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{path}.lock")
    start = time.monotonic()
    while True:
        try:
            lock.acquire(timeout=60)
            break
        except Timeout:
            waited_s = time.monotonic() - start
            logger.info("waiting for another process to %s (%d s so far)", purpose, waited_s)
    try:
        yield
    finally:
        lock.release()


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array atomically: a reader finds the old file or the new one."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}.part")
    try:
        with open(draft, "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def load_array(path: Path) -> np.ndarray | None:
    """Return the array, memory-mapped and read-only; None if there is no file."""
    try:
        # A plain view: indexing a np.memmap takes a microsecond more.
        return np.load(path, mmap_mode="r").view(np.ndarray)
    except FileNotFoundError:
        return None
    # NumPy raises EOFError for an empty file.
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not an array ({error}). Delete the file; it is made again.") from None
