"""Start the ranks of tests/train/rank_cases.py on this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "tests" / "train" / "rank_cases.py"


def launch(cases, directory, world_size=2, timeout_s=900):
    """Run the cases on ranks of this machine; return {name: [result of each rank]}."""
    (directory / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    common |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(WORKER), str(directory / "cases.json"), str(directory)]
    ranks = []
    for rank in range(world_size):
        env = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = open(directory / f"rank{rank}.log", "w")  # noqa: SIM115 - the process writes to it
        ranks.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world_size, (directory / "rank0.log").read_text()[-3000:]
    return {
        c["name"]: [json.loads((directory / f"{c['name']}_{r}.json").read_text()) for r in range(world_size)]
        for c in cases
    }
