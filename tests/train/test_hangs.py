"""A rank or a loader worker of a real run hangs or dies: the run ends, and says with what."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("hang_worker.py")


def run(directory, fault, flags, num_ranks=1, limit_s=600):
    """Return the exit codes and the last lines of the standard errors of the ranks; TimeoutExpired if they hang."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    ranks = []
    for rank in range(num_ranks):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_SIZE": num_ranks}
        own = {key: str(value) for key, value in own.items()} if num_ranks > 1 else {}
        log = open(directory / f"{rank}.log", "w")  # noqa: SIM115 - the process writes to it
        command = [sys.executable, str(WORKER), fault, *flags]
        ranks.append(subprocess.Popen(command, env=env | own, cwd=ROOT, stderr=log, stdout=subprocess.DEVNULL))
    try:
        codes = [rank.wait(limit_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    lines = [line for rank in range(num_ranks) for line in (directory / f"{rank}.log").read_text().splitlines()]
    return codes, [line for line in lines if line.startswith("llava-lite train")]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [[], ["--deepspeed", "zero2.json"]], ids=["ddp", "zero2"])
def test_a_rank_that_hangs_in_a_step_ends_the_run_by_ddp_timeout(engine, stage_flags, tmp_path):
    flags = stage_flags("full", tmp_path / "out", "--max_steps", 4, "--ddp_timeout", 15, *engine)
    shared = set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))
    codes, (said,) = run(tmp_path, "rank_hangs", flags, num_ranks=2)
    assert codes == [1, 1]
    assert re.search(
        r"rank 1 \(host \S+, pid \d+\) hangs at 'step 2: forward of records \['toy_\d+'.*hang_worker\.py:\d+ in "
        r"hang_in_step: time\.sleep\(10_000\)\. None of 2 ranks has made progress for --ddp_timeout 15 seconds",
        said,
    )
    assert set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*")) <= shared


@pytest.mark.slow
def test_a_loader_worker_that_hangs_ends_the_run_and_is_named_with_its_record(stage_flags, tmp_path):
    more = ["--max_steps", 8, "--ddp_timeout", 15, "--dataloader_num_workers", 2, "--feature_cache", "off"]
    codes, (said,) = run(tmp_path, "worker_hangs", stage_flags("full", tmp_path / "out", *more))
    assert codes == [1]
    assert re.search(
        r"the data loader has given no batch for \d+ s at 'step \d: waiting for a batch of the loader': worker \d "
        r"\(pid \d+\) has been reading record 'toy_005' \(toy\.json\[5\]\), image '5\.png' for \d+ s\.",
        said,
    )


@pytest.mark.slow
def test_a_loader_worker_that_is_killed_is_named_with_its_record(stage_flags, tmp_path):
    more = ["--max_steps", 8, "--dataloader_num_workers", 2, "--feature_cache", "off"]
    codes, (said,) = run(tmp_path, "worker_dies", stage_flags("full", tmp_path / "out", *more))
    assert codes == [1]
    assert re.search(
        r"worker \d \(pid \d+\) of the data loader was killed or crashed; it was reading record 'toy_005' \(toy\.json",
        said,
    )
