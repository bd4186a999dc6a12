"""The environment of quickstart.sh and test.sh: what is missing is reported before anything is done."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path for path in (ROOT / "scripts").rglob("*.s*") if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_has_no_syntax_error(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def in_env(code, **variables):
    """Run bash code after scripts/lib/env.sh and return the finished process."""
    env = {**os.environ, **variables}
    code = f'set -euo pipefail; source "{ROOT}/scripts/lib/env.sh"; {code}'
    return subprocess.run(["bash", "-c", code], env=env, capture_output=True, text=True, timeout=60)


def test_missing_compiler_is_named_with_the_line_that_installs_it():
    done = in_env(f'check_machine "{sys.executable}"', CXX="no-such-compiler")
    assert done.returncode == 1
    assert "a C++ compiler (no-such-compiler)" in done.stderr
    assert "sudo apt-get install -y" in done.stderr
    assert "g++" in done.stderr


def test_old_python_is_refused(tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = in_env("find_python", PYTHON=str(old))
    assert done.returncode == 1
    assert "no Python 3.10 or newer" in done.stderr


def test_full_disk_is_refused_before_anything_is_installed(tmp_path):
    done = in_env(f'MIN_FREE_GIB=999999; check_disk "{tmp_path}/not/yet"')
    assert done.returncode == 1
    assert f"GiB free under {tmp_path}, 999999 needed" in done.stderr


def test_environment_with_the_right_stamp_is_used_as_it_is(tmp_path):
    code = 'stamp_of "$ROOT/constraints.txt" >"$LLAVA_LITE_VENV/.llava_lite"; '
    code += 'ensure_environment "$ROOT/constraints.txt"; echo "$PATH"; echo "$PYTHONPATH"'
    done = in_env(code, LLAVA_LITE_VENV=str(tmp_path))
    assert done.returncode == 0, done.stderr
    path, python_path = done.stdout.splitlines()
    assert path.startswith(f"{tmp_path}/bin:")
    assert python_path.startswith(str(ROOT))
    assert done.stderr == ""


def test_directory_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    done = in_env('ensure_environment "$ROOT/constraints.txt"', LLAVA_LITE_VENV=str(tmp_path))
    assert done.returncode == 1
    assert "is no Python environment" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_lock_of_a_killed_build_is_removed_and_that_of_a_running_one_is_not(tmp_path):
    dead, live = tmp_path / "py311_cpu/dead/lock", tmp_path / "py311_cpu/live/lock"
    for lock in (dead, live):
        lock.parent.mkdir(parents=True)
        lock.touch()
    with live.open():
        done = in_env("remove_dead_locks", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not dead.exists()
    assert live.exists()
    assert str(dead) in done.stderr


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="this machine has no /dev/shm")
def test_shared_memory_of_a_run_that_ended_is_freed_and_that_of_a_running_one_is_not():
    buffers = [Path("/dev/shm", f"deepspeed_allreduce_buffer_test_{os.getpid()}_{kind}") for kind in ("dead", "live")]
    try:
        for buffer in buffers:
            buffer.write_bytes(bytes(mmap.PAGESIZE))
        with buffers[1].open("r+b") as file, mmap.mmap(file.fileno(), 0):
            done = in_env("remove_dead_buffers")
        assert done.returncode == 0, done.stderr
        assert [buffer.exists() for buffer in buffers] == [False, True]
    finally:
        for buffer in buffers:
            buffer.unlink(missing_ok=True)


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_help_lists_every_option(script, bash):
    path = ROOT / "scripts" / script
    done = bash(path, "--help")
    assert done.returncode == 0, done.stderr
    options = {"quickstart.sh": ["--system", "--out", "--ranks", "--zero"], "test.sh": ["--slow", "--oldest"]}[script]
    assert all(option in done.stdout for option in options)
    assert "set -" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "2"], "unknown option '--rank'; known: --system NAME, --out DIR, --ranks N, --zero 2|3, --help."),
        (["--system", "blip"], "--system blip: llava, adapter, imagebind or accessory."),
        (["--ranks", "two"], "--ranks two: a number of processes."),
        (["--zero", "1"], "--zero 1: 2 or 3."),
        (["--out"], "--out needs a value"),
    ],
)
def test_quickstart_refuses_what_it_does_not_know(arguments, message, bash):
    done = bash(ROOT / "scripts/quickstart.sh", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
