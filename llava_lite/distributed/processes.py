"""Look at and end processes of this machine, by the number and the start time that make one unique."""

import multiprocessing
import os
import signal
import time
from pathlib import Path


def get_start(pid: int) -> str | None:
    """Return when a process started, in ticks since boot; None where it is gone or the system does not tell."""
    fields = _read(pid)
    return fields[19] if fields else None


def is_gone(pid: int, start: str | None) -> bool:
    """Tell whether a process that started then has ended; False on a system that does not tell."""
    if start is None:
        return False
    fields = _read(pid)
    # A zombie has ended, and waits for its parent to ask.
    return not fields or fields[19] != start or fields[0] in "ZX"


def has_ended(pid: int) -> bool:
    """Tell whether a child process has just ended; False on a system that does not tell."""
    fields = _read(pid)
    return bool(_read(os.getpid())) and (not fields or fields[0] in "ZX")


def is_stopped(pid: int, start: str | None) -> bool:
    """Tell whether a signal or a debugger has stopped a process."""
    fields = _read(pid)
    return bool(fields) and fields[19] == start and fields[0] in "Tt"


def end_process(pid: int, start: str | None) -> None:
    """End a process that started then; one that is stopped reacts to no other signal."""
    if start is not None and not is_gone(pid, start):
        try:
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return


def end_children(owner: int, limit_s: float = 5.0) -> None:
    """End the daemonic children of the process `owner` that are left when it ends, for `atexit`.

    Python ends them with SIGTERM, and waits for ever for one that blocks it, as a loader worker of a run does, or that
    is stopped. Here one that is left after `limit_s` seconds is killed.
    """
    # A forked process has the list of its parent's children.
    children = [child for child in multiprocessing.active_children() if child.daemon] if os.getpid() == owner else []
    if not children:
        return
    if hasattr(signal, "SIGCHLD"):
        # torch raises an error for each killed worker.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in children:
        child.terminate()
    deadline = time.monotonic() + limit_s
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
        if child.is_alive():
            child.kill()


def is_mapped(path: Path) -> bool:
    """Tell whether a process of this user has a file in its memory, as far as the system tells."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if str(path) in maps.read_text():
                return True
        except OSError:  # another user's, or it has just ended
            continue
    return False


def is_open(path: Path) -> bool:
    """Tell whether a process of this user has a file open; True on a system that does not tell."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(path):
                return True
        except OSError:  # another user's, or it has just been closed
            continue
    return not Path("/proc/self/fd").is_dir()


def _read(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on, [] where there is no such process."""
    try:
        # "12 (name) S 1 ...": the name may hold blanks and brackets.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
