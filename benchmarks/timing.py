"""Turn rival runners into medians and ratios of one interleaved run, with the spread of a run against itself.

Machines drift: a neighbour wakes up, a clock falls. So no runner is ever timed on its own. Every round calls every
runner once, in an order that is drawn, and a ratio is the median over rounds of the two times of the same round. One
runner is called twice a round; its ratio to itself says how small a difference still means something.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path

AGAIN = " (again)"
LIBRARIES = ("torch", "transformers", "deepspeed", "accelerate", "peft", "pillow", "liger_kernel", "flash_attn")


@dataclass
class Samples:
    """Seconds of one runner, a value a round; cpu_s sums over the threads of this process."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


def interleave(
    runners: dict[str, Callable[[], float | tuple[float, float] | None]],
    rounds: int = 5,
    warmup: int = 1,
    again: str | None = None,
) -> dict[str, Samples]:
    """Return the samples of each runner over `rounds` rounds, behind `warmup` rounds that are not kept.

    A runner does one piece of work. It returns None and is timed here, or the seconds that it took by its own clock
    (wall, or wall and CPU): of a subprocess, or of a device. again: the runner that is called twice a round, the first
    one unless named; every second round its first call counts as itself and its second as AGAIN, else the other way
    round. The warm-up calls every runner once a round.
    """
    if rounds < 1 or not runners:
        raise ValueError(f"{rounds} rounds of {len(runners)} runners; give at least one of each.")
    again = again if again is not None else next(iter(runners))
    samples = {name: Samples() for name in [*runners, again + AGAIN]}
    for runner in [*runners.values()] * warmup:
        timed(runner)
    for name in orders(list(runners), again, rounds):
        wall_s, cpu_s = timed(runners[name.removesuffix(AGAIN)])
        samples[name].wall_s.append(wall_s)
        samples[name].cpu_s.append(cpu_s)
    return samples


def orders(names: list[str], again: str, rounds: int) -> list[str]:
    """Return the names of all calls: each round shuffled, the twins apart where there are three runners or more."""
    draw, calls = random.Random(0), []
    for turn in range(rounds):
        order = [*names, again]
        while True:
            draw.shuffle(order)
            # Across the border of two rounds too.
            row = [*calls[-1:], *order]
            near = any(a.removesuffix(AGAIN) == b for a, b in itertools.pairwise(row))
            if len(names) < 3 or not near:
                break
        first = order.index(again)
        order[first if turn % 2 else order.index(again, first + 1)] += AGAIN
        calls += order
    return calls


def timed(runner) -> tuple[float, float]:
    """Return (wall, CPU) seconds of one call."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    own = runner()
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    if own is None:
        return wall_s, cpu_s
    return own if isinstance(own, tuple) else (own, cpu_s)


def summary(samples: dict[str, Samples], base: str, work: dict | list[float] | float = 1.0) -> dict:
    """Return {name: figures} of interleaved samples, every ratio against `base` (above 1: faster than it).

    work: units of one call, such as tokens: a number, or a list of a number a round, of all runners or in a dict of
    each; `rate` is units a second of wall time. `ratio`
    and `ratio_cpu` are medians of the rounds' own ratios of seconds a unit; `ratio_range` their least and largest. The
    runner that ran twice has `self_ratio` and `self_range`: itself against itself, the noise of this run.
    """
    if base not in samples:
        raise ValueError(f"no runner {base!r}; known: {', '.join(samples)}.")
    own_work = work if isinstance(work, dict) else dict.fromkeys(samples, work)
    per_unit = {name: _per_unit(one, own_work[name.removesuffix(AGAIN)]) for name, one in samples.items()}
    figures = {}
    for name, one in samples.items():
        if name.endswith(AGAIN):
            continue
        mine = per_unit[name]
        ratios = _ratios(per_unit[base].wall_s, mine.wall_s)
        figures[name] = {
            "wall_s": statistics.median(one.wall_s),
            "cpu_s": statistics.median(one.cpu_s),
            "rate": 1 / statistics.median(mine.wall_s),
            "cpu_s_per_unit": statistics.median(mine.cpu_s),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "ratio_cpu": statistics.median(_ratios(per_unit[base].cpu_s, mine.cpu_s)),
            "wall_s_each": one.wall_s,
            "cpu_s_each": one.cpu_s,
        }
        if name + AGAIN in samples:
            own = _ratios(mine.wall_s, per_unit[name + AGAIN].wall_s)
            own_cpu = _ratios(mine.cpu_s, per_unit[name + AGAIN].cpu_s)
            figures[name] |= {
                "self_ratio": statistics.median(own),
                "self_range": [min(own), max(own)],
                "self_ratio_cpu": statistics.median(own_cpu),
                "self_range_cpu": [min(own_cpu), max(own_cpu)],
                "wall_s_each_again": samples[name + AGAIN].wall_s,
                "cpu_s_each_again": samples[name + AGAIN].cpu_s,
            }
    return figures


def _per_unit(one: Samples, work: list[float] | float) -> Samples:
    counts = work if isinstance(work, list) else [work] * len(one.wall_s)
    return Samples(*([s / n for s, n in zip(clock, counts, strict=True)] for clock in (one.wall_s, one.cpu_s)))


def _ratios(base: list[float], other: list[float]) -> list[float]:
    # A call too short for the processor's clock reads 0.
    return [b / max(o, 1e-9) for b, o in zip(base, other, strict=True)]


def machine(threads: int | None = None) -> dict:
    """Return what a figure depends on: date, processor, cores, device, versions, commit, and how busy it was."""
    import torch

    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processor": _processor(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": threads if threads is not None else torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo")
    if lines.exists():
        for line in lines.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@cache
def _commit() -> str | None:
    """Return the commit at the first call, "-dirty" behind it if files differ, those of the results apart."""
    written = [f":(top,exclude)benchmarks/{name}" for name in ("results", "RESULTS.md", "results.png")]
    options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": False}
    answer = subprocess.run(["git", "describe", "--always"], **options).stdout.strip()
    differs = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ":/", *written], **options).returncode == 1
    return answer + "-dirty" * differs if answer else None


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process since it started or since `forget_peak`."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> int:
    """Begin the peak of memory anew, where the system can (Linux), and return what is resident now."""
    gc.collect()
    refs = Path("/proc/self/clear_refs")
    if refs.exists():
        refs.write_text("5")
    return peak_rss_bytes()


def arguments(description: str, argv=None, add=None) -> argparse.Namespace:
    """Return the flags of a benchmark: --json, --quick, --rounds, --threads, and those that `add(parser)` adds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", help="file that the figures are written to")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that everything runs")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    if add is not None:
        add(parser)
    args = parser.parse_args(argv)
    # Now: what is committed while the benchmark runs is not what it measured.
    _commit()
    if args.quick:
        args.rounds = min(args.rounds, 2)
    return args


def write_result(name: str, results: dict, file: str | None = None, threads: int | None = None, **settings) -> dict:
    """Return {"name", "settings", "machine", "results"}, written to `file` as JSON if it is named."""
    report = {"name": name, "settings": settings, "machine": machine(threads), "results": results}
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report
