"""Keep a second run out of the output directory of one that is running, on this machine or another.

The kernel's lock on a file in the directory ends with the process that holds it, whatever ends it, and is seen from
every container of a machine. From another machine it is seen where the file system passes it on. For those that do
not, the file names its owner, who writes a new number into it every few seconds: a process that finds the file of
another machine watches for some seconds whether the number changes. No clocks are compared, no process number is
trusted.
"""

import atexit
import errno
import json
import logging
import os
import socket
import threading
import time
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from pathlib import Path
from uuid import uuid4

from llava_lite.distributed.ranks import everyone
from llava_lite.train.together import together

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK = ".llava_lite.lock"
BEAT_S = 4.0
# Five beats: a network file system may show a write late.
WATCH_S = 20.0
HELD_BY_ANOTHER = {errno.EAGAIN, errno.EACCES}

# The locks that this process holds, by directory. One process trains in a directory as often as it likes.
_held = {}


class OutputInUse(ValueError):
    """Another run trains in the output directory."""


class OutputLock:
    """The lock of one process on a directory; `run` is the same on all ranks of a run.

    beat_s: seconds between two numbers of the owner. watch_s: how long another machine waits for a new one.
    """

    def __init__(self, directory: str | Path, run: str, beat_s: float | None = None, watch_s: float | None = None):
        self.directory, self.path = Path(directory), Path(directory) / LOCK
        self.run, self.pid = run, os.getpid()
        self.beat_s, self.watch_s = BEAT_S if beat_s is None else beat_s, WATCH_S if watch_s is None else watch_s
        self.file, self.made_directory, self._ends = None, None, threading.Event()

    def acquire(self) -> None:
        """Take the lock; OutputInUse if another run has it. Nothing happens where the file cannot be written.

        The place that writes first reports that, with what it needs.
        """
        while self.file is None:
            try:
                self._make_directory()
                file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError:
                return
            try:
                self.file = self._take(file)
            finally:
                if self.file is None:
                    os.close(file)
            if self.file is None and self._is_of_this_run():
                return
        self.record = {
            "host": socket.gethostname(),
            "process": self.pid,
            "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
            "machine": get_machine(self.file),
            "run": self.run,
            "beat": 0,
        }
        self._write()
        self._thread = threading.Thread(target=self._beat, name="output lock", daemon=True)
        self._thread.start()

    def _make_directory(self) -> None:
        """Make the directory, and remember the uppermost one that was not there."""
        missing = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        self.directory.mkdir(parents=True, exist_ok=True)
        self.made_directory = self.made_directory or (missing[-1] if missing else None)

    def _take(self, file: int) -> int | None:
        """Return the file if this process has the lock on it now, None to try again; OutputInUse if another has it."""
        is_free = lock_file(file)
        owner = self._read_owner() if is_free is False else read_record(self.path)
        if not is_named(file, self.path) or owner.get("run") == self.run:
            # Its owner has just ended and taken its name away; or see _is_of_this_run.
            return None
        is_other_machine = bool(owner) and owner.get("machine") != get_machine(file)
        # None: the file system has no locks.
        if is_free is False and not is_other_machine:
            raise self._in_use(owner)
        if owner and (is_other_machine or is_free is None) and self._is_alive(owner):
            raise self._in_use(owner)
        if is_free is False:
            # Its machine is gone, and the server of the file system has not noticed yet.
            self.path.unlink(missing_ok=True)
            return None
        return file if is_named(file, self.path) else None

    def _read_owner(self) -> dict:
        """Return what the owner wrote; one that has just begun may not have written yet."""
        for _ in range(20):
            if (owner := read_record(self.path)) or not self.path.exists():
                return owner
            time.sleep(0.1)
        return {}

    def _is_of_this_run(self) -> bool:
        """Whether another node of this run has the lock: with --save_on_each_node on a disk that they share."""
        return read_record(self.path).get("run") == self.run

    def _is_alive(self, owner: dict) -> bool:
        """Whether the owner writes a new number within some seconds."""
        logger.info(
            "%s names a run on %s: waiting up to %.0f s to see whether it is alive.",
            self.path, owner.get("host", "another machine"), self.watch_s,
        )  # fmt: skip
        deadline = time.monotonic() + self.watch_s
        while time.monotonic() < deadline and self.path.exists():
            time.sleep(min(self.beat_s, 1.0) / 4)
            # Empty: read in the middle of a write.
            if read_record(self.path) not in ({}, owner):
                return True
        return False

    def _in_use(self, owner: dict) -> OutputInUse:
        known = "host {host}, process {process}, since {since}".format_map(
            {key: owner.get(key, "unknown") for key in ("host", "process", "since")}
        )
        return OutputInUse(f"--output_dir {str(self.directory)!r} is in use by another run ({known})")

    def _write(self) -> None:
        """Write the record in place; on a full disk the kernel's lock has to do."""
        try:
            text = json.dumps(self.record).encode()
            os.pwrite(self.file, text, 0)
            os.ftruncate(self.file, len(text))
            os.fsync(self.file)
        except OSError as error:
            logger.debug("%s is not written: %s", self.path, error)

    def _beat(self) -> None:
        """Write a new number every few seconds, until the lock is released or lost."""
        while not self._ends.wait(self.beat_s):
            if not is_named(self.file, self.path):
                logger.warning("%s is gone: another run may write to %s now.", self.path, self.directory)
                return
            self.record["beat"] += 1
            self._write()

    def release(self) -> None:
        """Give the lock back, and delete its file, and the directory if it was made for it and is empty."""
        if self.file is None or self.pid != os.getpid():
            return
        self._ends.set()
        # A write to a disk that does not answer; the thread must not write to a number that names another file.
        self._thread.join(timeout=10)
        file, self.file = self.file, None
        if is_named(file, self.path):
            self.path.unlink(missing_ok=True)
        if not self._thread.is_alive():
            os.close(file)
        self._remove_empty()

    def _remove_empty(self) -> None:
        path = self.directory
        while self.made_directory is not None and path.is_relative_to(self.made_directory):
            try:
                path.rmdir()
            except OSError:
                return
            path = path.parent


def lock_file(file: int) -> bool | None:
    """Return whether this process has the kernel's lock on a file now; None where the file system has none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return False if error.errno in HELD_BY_ANOTHER else None


def is_named(file: int, path: Path) -> bool:
    """Whether a path still names the open file."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False


def get_machine(file: int) -> list:
    """Return what tells machines apart by their locks: which kernel started when, and the file system as it sees it.

    Containers of a machine share both; host names and process numbers may be equal on two.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = socket.gethostname()
    return [boot, os.fstat(file).st_dev]


def read_record(path: Path) -> dict:
    """Return what the owner wrote; {} if there is nothing that can be read.

    Opened again each time, which makes a network file system ask its server.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def hold_output(args) -> bool:
    """Take the lock of args.output_dir, on the ranks that write; return False if this process has it already.

    All ranks must call it; OutputInUse on all of them if another run has it.
    """
    key = os.path.realpath(args.output_dir)
    if key in _held:
        return False
    _prepare_process()
    lock = OutputLock(args.output_dir, everyone(uuid4().hex)[0])
    advice = "Wait until it has ended or end it, or give another --output_dir."
    with together(OutputInUse, advice, OutputInUse):
        if args.should_save:
            lock.acquire()
    _held[key] = lock
    return True


@contextmanager
def output_held(args):
    """Hold the lock of args.output_dir inside; it stays if this process had it before. All ranks must call it."""
    is_taken = hold_output(args)
    try:
        yield
    finally:
        if is_taken:
            release_output(args)


def release_output(args) -> None:
    """Give back the lock of args.output_dir, if this process has it."""
    lock = _held.pop(os.path.realpath(args.output_dir), None)
    if lock is not None:
        lock.release()


@cache
def _prepare_process() -> None:
    """Release the locks when this process ends, and keep them out of those that it forks."""
    atexit.register(_release_all)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget)


def _release_all() -> None:
    while _held:
        _held.popitem()[1].release()


def _forget() -> None:
    """Close what a forked process, such as a loader worker, inherits: it may outlive the owner, and hold the lock."""
    for lock in _held.values():
        if lock.file is not None:
            os.close(lock.file)
            lock.file = None
    _held.clear()
