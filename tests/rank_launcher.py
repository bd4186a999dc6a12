"""Start a script of tests/train as the ranks of this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "tests" / "train"


def launch(cases, directory, world_size=2, timeout_s=900):
    """Run the cases of rank_cases.py on ranks of this machine; return {name: [result of each rank]}."""
    (directory / "cases.json").write_text(json.dumps(cases))
    run_ranks([TRAIN / "rank_cases.py", directory / "cases.json", directory], directory, world_size, timeout_s)
    return {
        c["name"]: [json.loads((directory / f"{c['name']}_{r}.json").read_text()) for r in range(world_size)]
        for c in cases
    }


def run_ranks(words, directory, world_size=2, timeout_s=900):
    """Run a script with its arguments as each rank; every rank must end with 0 in time. Logs go to `directory`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    common |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in range(world_size):
        env = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = open(directory / f"rank{rank}.log", "w")  # noqa: SIM115 - the process writes to it
        command = [sys.executable, *map(str, words)]
        ranks.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world_size, (directory / "rank0.log").read_text()[-3000:]
