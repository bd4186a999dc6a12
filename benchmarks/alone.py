"""Run a rival alone in its own process, as a user runs it, and return the JSON that it prints last.

A rival beside others measures how they share a processor. Without AVX-512 six resident processes once gave a ratio of
2.03 where single ones gave 1.53.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.timing import AGAIN, Samples, orders

# Seconds that a process may take.
LIMIT_S = 1200
ROOT = Path(__file__).resolve().parents[1]


def run_alone(module: str, *arguments: str, threads: int | None = None, python_path: str | None = None) -> dict:
    """Run `python -m MODULE ARGUMENTS` and return the JSON in the last line of its output.

    threads: of torch. python_path: directories that come right after this checkout. Raises RuntimeError with the end
    of what it printed if it fails or runs longer than LIMIT_S.
    """
    paths = [str(ROOT), python_path, os.environ.get("PYTHONPATH")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{module} {' '.join(arguments)} did not end within {LIMIT_S} s.") from error
    if done.returncode or not done.stdout.strip():
        printed = (done.stdout + done.stderr)[-3000:]
        raise RuntimeError(f"{module} {' '.join(arguments)} ended with {done.returncode}:\n{printed}")
    return json.loads(done.stdout.splitlines()[-1])


def run_rounds(
    start: Callable[[str, int], dict], names: list[str], again: str, rounds: int, first: int = 0
) -> dict[str, list[dict]]:
    """Return {name: a report for each round} of processes that follow each other, the order of a round drawn.

    start: (name, round) -> the report of a process. again: the runner that starts twice a round, once as AGAIN. first:
    the number of the first round.
    """
    reports = {name: [] for name in [*names, again + AGAIN]}
    for name in orders(names, again, rounds):
        reports[name].append(start(name.removesuffix(AGAIN), first + len(reports[name])))
    return reports


def get_samples(reports: dict[str, list[dict]]) -> dict[str, Samples]:
    """Return the "wall_s" and "cpu_s" of reports, to be summed up by `summary`."""
    return {
        name: Samples([report["wall_s"] for report in found], [report["cpu_s"] for report in found])
        for name, found in reports.items()
    }
