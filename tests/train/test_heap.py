"""Whether a process that keeps freed memory finds it again."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from llava_lite.train.heap import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("no glibc")
    raise SystemExit
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12 * 2**20).add_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


@pytest.mark.parametrize(("mode", "finds_it"), [("keep", True), ("give back", False)])
def test_a_large_block_costs_page_faults_once_only(mode, finds_it):
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    if done.stdout.strip() == "no glibc":
        pytest.skip("the C library is not glibc")
    assert (int(done.stdout) < 1000) is finds_it


def test_a_trainer_on_the_cpu_keeps_it(run_stage, tmp_path, monkeypatch):
    from llava_lite.train import llava_trainer

    asked = []
    monkeypatch.setattr(llava_trainer, "keep_freed_memory", lambda: asked.append(1))
    run_stage("projector", tmp_path / "out", "--max_steps", 1)
    assert asked == [1]
