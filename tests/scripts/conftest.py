"""Run the scripts with launchers that start nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bash(script, *arguments, path=None, cwd=None, timeout=60, **variables):
    """Run a script with variables beside a plain environment and return the finished process."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    directories = [str(directory) for directory in (path, Path(sys.executable).parent) if directory is not None]
    env = {**kept, **variables, "PATH": os.pathsep.join([*directories, os.environ["PATH"]])}
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(name="bash")
def bash_fixture():
    """Return `bash`."""
    return bash


@pytest.fixture
def echo(tmp_path):
    """Return a directory of launchers that print their own name and arguments as JSON and start nothing."""
    directory = tmp_path / "bin with space"
    directory.mkdir()
    for name in ("deepspeed", "torchrun", "accelerate"):
        script = directory / name
        script.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(['{name}', *sys.argv[1:]]))\n")
        script.chmod(0o755)
    return directory


@pytest.fixture
def launched(echo):
    """Return a function: recipe, flags, variables -> (what stands before the training script, its flags)."""

    def launch(recipe, *flags, **variables):
        done = bash(ROOT / f"scripts/v1_5/{recipe}.sh", *flags, path=echo, **variables)
        assert done.returncode == 0, done.stderr
        command = json.loads(done.stdout)
        at = command.index(str(ROOT / "llava_lite/train/train_mem.py"))
        return command[:at], command[at + 1 :]

    return launch
