"""Whether a process that keeps freed memory finds it again."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from llava_lite.train.heap import keep_freed_memory
if not keep_freed_memory():
    print("no glibc")
    raise SystemExit
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**20).add_(1) for _ in range(40)]
    del blocks
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[1:]))
"""


def test_what_a_step_frees_costs_page_faults_once_only():
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    if done.stdout.strip() == "no glibc":
        pytest.skip("the C library is not glibc")
    # 40 blocks of 4 MiB are 40,960 pages. The least of the rounds: a kernel that moves pages counts faults of its own.
    assert int(done.stdout) < 1000


def test_a_trainer_on_the_cpu_keeps_it(run_stage, tmp_path, monkeypatch):
    from llava_lite.train import llava_trainer

    asked = []
    monkeypatch.setattr(llava_trainer, "keep_freed_memory", lambda: asked.append(1))
    run_stage("projector", tmp_path / "out", "--max_steps", 1)
    assert asked == [1]
