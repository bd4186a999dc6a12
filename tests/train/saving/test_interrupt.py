"""A run that ends, well or with an error, ends: its loaders' workers, which SIGTERM cannot end, do not hold it."""

import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_lite.train.inputs.shards import StreamLoader


def test_a_run_leaves_whatever_holds_its_workers(tmp_path):
    script = Path(__file__).with_name("leaving_run.py")
    runs = {
        how: subprocess.Popen(
            [sys.executable, script, tmp_path / how, how],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for how in ("frame", "child", "worker")
    }
    left = {}
    try:
        for how, run in runs.items():
            output, errors = run.communicate(timeout=120)
            assert run.returncode == 0, errors
            assert "Traceback" not in errors
            left[how] = output.splitlines()[-1]
    finally:
        for run in runs.values():
            run.kill()
    assert left == {"frame": "left 0", "child": "left 1", "worker": "left 1"}


def test_a_loader_of_streams_ends_its_workers_when_its_iterator_is_closed():
    batches = iter(StreamLoader(range(40), batch_size=None, num_workers=2))
    assert next(batches) == 0
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.parametrize("persistent", ["False", "True"])
def test_run_that_fails_with_workers_returns_with_its_error(persistent, stage_flags, tmp_path):
    flags = ["--learning_rate", "1e30", "--max_steps", "6", "--dataloader_num_workers", "2"]
    flags = stage_flags("full", tmp_path / "out", *flags, "--dataloader_persistent_workers", persistent)
    # Without the fix it never returns.
    done = subprocess.run(
        [sys.executable, "-m", "llava_lite.train.train", *flags],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert re.match(r"llava-lite train: step 2: rank 0: loss \w+ for samples", done.stderr.splitlines()[-1])


@pytest.mark.slow
def test_run_with_persistent_workers_and_an_evaluation_returns(stage_flags, tmp_path):
    flags = ["--max_steps", "2", "--dataloader_num_workers", "2", "--dataloader_persistent_workers", "True"]
    flags += ["--eval_split", "4", "--eval_strategy", "steps", "--eval_steps", "1"]
    # Without the fix it never returns.
    done = subprocess.run(
        [sys.executable, "-m", "llava_lite.train.train", *stage_flags("full", tmp_path / "out", *flags)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
