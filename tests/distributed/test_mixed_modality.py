"""Ranks with images and ranks with text, mixed at random: no hang, and the loss of one process."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("mixed_modality_worker.py")
CASES = [
    {"moe": moe, "stage": stage, "seed": seed, "checkpointing": checkpointing, "anyres": anyres}
    for moe, anyres in ((False, False), (True, False), (False, True))
    for stage in (2, 3)
    for seed, checkpointing in ((0, False), (1, True))
]


def random_cases(count: int, seed: int) -> list[dict]:
    """Return schedules that are drawn at random: their batches, ZeRO stage, experts, checkpointing and crops."""
    rng = random.Random(seed)
    cases = []
    for i in range(count):
        moe, anyres = rng.choice([(False, False), (True, False), (False, True)])
        case = {"moe": moe, "anyres": anyres, "stage": rng.choice([2, 3]), "checkpointing": rng.random() < 0.5}
        cases.append(case | {"seed": 1000 * seed + i})
    return cases


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def spawn(world: int, out: Path, timeout_s: float, cases, *flags) -> list[int]:
    """Run the worker on `world` ranks of this host; return their exit codes, raise TimeoutExpired on a hang."""
    common = os.environ | {
        "WORLD_SIZE": str(world),
        "LOCAL_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(WORKER), "--cases", json.dumps(cases), "--out", str(out), *flags]
    ranks = [
        subprocess.Popen(
            command,
            env=common | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.DEVNULL,
            stderr=(out.parent / f"rank{r}.log").open("w"),
        )
        for r in range(world)
    ]
    try:
        return [r.wait(timeout=timeout_s) for r in ranks]
    finally:
        for r in ranks:
            r.kill()
            r.wait()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_mixed_ranks_neither_hang_nor_change_the_loss(world, tmp_path):
    assert_as_one_process(world, tmp_path, CASES, 500)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_two_hundred_random_schedules_neither_hang_nor_change_the_loss(world, tmp_path):
    for part in range(4):
        (tmp_path / str(part)).mkdir()
        assert_as_one_process(world, tmp_path / str(part), random_cases(25, 4 * world + part), 1500)


def assert_as_one_process(world: int, directory: Path, cases, timeout_s: float) -> None:
    """Run cases on `world` ranks; compare each loss and answer with those of one process."""
    out = directory / "losses.json"
    codes = spawn(world, out, timeout_s, cases)
    assert codes == [0] * world, (directory / "rank0.log").read_text()[-3000:]
    for result in json.loads(out.read_text()):
        assert result["losses"] == pytest.approx(result["expected"]["losses"], abs=1e-5), result["case"]
        assert result["tokens"] == result["expected"]["tokens"], result["case"]


@pytest.mark.slow
@pytest.mark.parametrize("anyres", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_without_the_dummy_image_the_ranks_do_not_finish(stage, anyres, tmp_path):
    case = [{"moe": False, "stage": stage, "seed": 0, "checkpointing": False, "anyres": anyres}]
    try:
        codes = spawn(2, tmp_path / "losses.json", 60, case, "--without_dummy")
    except subprocess.TimeoutExpired:
        return
    assert any(codes)
