"""Locks of DeepSpeed's extensions: those of killed builds end the run, those of others are waited for."""

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llava_lite.train.deepspeed.build_locks import MOST_S, wait_for_builds

MODULE = "llava_lite.train.deepspeed.build_locks"
PROC = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not tell what processes do")


@pytest.fixture
def make_lock(tmp_path, monkeypatch):
    """Return a function: extension, age in seconds -> its lock, as torch makes it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    def make(extension, age_s=0.0):
        lock = tmp_path / extension / "lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (time.time() - age_s,) * 2)
        return lock

    return make


@PROC
@pytest.mark.parametrize("extension", ["deepspeed_shm_comm", "py311_cpu/cpu_adam"])
def test_a_lock_of_a_build_that_was_killed_ends_the_run_with_what_to_do(make_lock, extension):
    lock = make_lock(extension, 2 * MOST_S)
    with pytest.raises(OSError, match=r"is 20 min old, and no process here has it open: .* Remove the file") as found:
        wait_for_builds()
    assert str(found.value).startswith(str(lock))


@PROC
def test_a_young_lock_that_nobody_here_has_open_is_waited_for_with_one_line(make_lock, caplog):
    lock = make_lock("deepspeed_shm_comm", 60)
    threading.Timer(3, lock.unlink).start()
    with caplog.at_level(logging.WARNING, logger=MODULE):
        wait_for_builds(interval_s=0.2)
    assert not lock.exists()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith(f"{lock} is 1 min old, and no process here has it open: ")


@PROC
def test_a_young_lock_that_stays_ends_the_run_in_the_end(make_lock):
    make_lock("deepspeed_shm_comm")
    with pytest.raises(OSError, match="the build that made it was killed"):
        wait_for_builds(most_s=2, interval_s=0.2)


@pytest.mark.parametrize("age_s", [0, 2 * MOST_S])
def test_a_build_that_runs_here_is_left_to_deepspeed(make_lock, caplog, age_s):
    lock = make_lock("deepspeed_shm_comm", age_s)
    code = f"file = open({str(lock)!r}); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as build:
        build.stdout.readline()
        wait_for_builds()
        build.communicate(b"\n")
    assert caplog.records == []


def test_locks_of_others_and_none_at_all_are_no_matter(make_lock, caplog):
    wait_for_builds()
    make_lock("of_another_project", 2 * MOST_S)
    wait_for_builds()
    assert caplog.records == []
