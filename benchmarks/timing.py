"""Turn rival runners into medians and ratios of interleaved rounds, with the spread of one runner over itself.

The speed of a machine drifts, so rivals are timed by turns: every round calls every runner once, in random order. A
ratio is the ratio of the two medians over the rounds; its range is that of the ratios within each round. One runner is
called twice a round: its ratio to itself shows which differences are noise.
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
    """Seconds of one runner, a value for each round; cpu_s sums over the threads of this process."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


def interleave(
    runners: dict[str, Callable[[], float | tuple[float, float] | None]],
    rounds: int = 5,
    warmup: int = 1,
    again: str | None = None,
) -> dict[str, Samples]:
    """Return the samples of each runner over `rounds` rounds, after `warmup` rounds that are not kept.

    A runner does one piece of work. It returns None and is timed here, or it returns its own seconds (wall, or wall
    and CPU), for instance those of a subprocess or of a device. again: the runner that is called twice a round,
    by default the first one; in every second round its first call counts as itself and its second as AGAIN, otherwise
    the other way round. A warm-up round calls every runner once.
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
    """Return the names of all calls, each round shuffled; of three runners or more, `again` never repeats at once."""
    draw, calls = random.Random(0), []
    for turn in range(rounds):
        order = [*names, again]
        while True:
            draw.shuffle(order)
            # Also across two rounds.
            sequence = [*calls[-1:], *order]
            adjacent = any(a.removesuffix(AGAIN) == b for a, b in itertools.pairwise(sequence))
            if len(names) < 3 or not adjacent:
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
    """Return {name: figures} of interleaved samples, every ratio over `base` (above 1: faster than it).

    work: units of one call, such as tokens: a number, or a list with a number for each round, of all runners or in a
    dict of each; `rate` is units per second of wall time. `ratio` and `ratio_cpu` are ratios of the medians of seconds
    per unit, `ratio_range` is the least and the largest ratio within a round. A runner that stopped after some rounds
    is compared in those. The runner that ran twice a round has `self_ratio` and `self_range`: itself over itself.
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
        ratio, ratio_range = _ratio(per_unit[base].wall_s, mine.wall_s)
        figures[name] = {
            "wall_s": statistics.median(one.wall_s),
            "cpu_s": statistics.median(one.cpu_s),
            "rate": 1 / statistics.median(mine.wall_s),
            "cpu_s_per_unit": statistics.median(mine.cpu_s),
            "ratio": ratio,
            "ratio_range": ratio_range,
            "ratio_cpu": _ratio(per_unit[base].cpu_s, mine.cpu_s)[0],
            "wall_s_each": one.wall_s,
            "cpu_s_each": one.cpu_s,
        }
        if name + AGAIN in samples:
            again = per_unit[name + AGAIN]
            self_ratio, self_range = _ratio(mine.wall_s, again.wall_s)
            self_ratio_cpu, self_range_cpu = _ratio(mine.cpu_s, again.cpu_s)
            figures[name] |= {
                "self_ratio": self_ratio,
                "self_range": self_range,
                "self_ratio_cpu": self_ratio_cpu,
                "self_range_cpu": self_range_cpu,
                "wall_s_each_again": samples[name + AGAIN].wall_s,
                "cpu_s_each_again": samples[name + AGAIN].cpu_s,
            }
    return figures


def _per_unit(one: Samples, work: list[float] | float) -> Samples:
    counts = work if isinstance(work, list) else [work] * len(one.wall_s)
    return Samples(*([s / n for s, n in zip(clock, counts, strict=False)] for clock in (one.wall_s, one.cpu_s)))


def _ratio(base: list[float], other: list[float]) -> tuple[float, list[float]]:
    """Return the ratio of the medians over the rounds that both have, and the range of the ratios within a round."""
    # The clock of a very short call may read 0.
    pairs = [(b, max(o, 1e-9)) for b, o in zip(base, other, strict=False)]
    base_s, other_s = (statistics.median(clock) for clock in zip(*pairs, strict=True))
    each = [b / o for b, o in pairs]
    return base_s / other_s, [min(each), max(each)]


def machine(threads: int | None = None) -> dict:
    """Return what a figure depends on: date, processor and vector width, cores, device, load, versions, commit."""
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
        # AVX512, AVX2, ...: the vectors that torch's own kernels use here.
        "vector_width": torch.backends.cpu.get_cpu_capability(),
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
    """Return the commit at the first call, with "-dirty" if files other than the results differ from it."""
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
    """Reset the peak of resident memory, where the system can (Linux), and return what is resident now."""
    gc.collect()
    refs = Path("/proc/self/clear_refs")
    if refs.exists():
        refs.write_text("5")
    return peak_rss_bytes()


def arguments(description: str, argv=None, add=None, rounds: int = 5) -> argparse.Namespace:
    """Return the flags of a benchmark: --json, --quick, --rounds, --threads, and those that `add(parser)` adds.

    rounds: the default of --rounds. --quick makes it one round.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--quick", action="store_true", help="toy sizes and one round: shows that everything runs")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"interleaved rounds (default: {rounds})")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    if add is not None:
        add(parser)
    args = parser.parse_args(argv)
    # Read now: a commit made while the benchmark runs is not what it measured.
    _commit()
    if args.quick:
        args.rounds = 1
    return args


def write_result(name: str, results: dict, file: str | None = None, threads: int | None = None, **settings) -> dict:
    """Return {"name", "settings", "machine", "results"}, written to `file` as JSON if one is given."""
    report = {"name": name, "settings": settings, "machine": machine(threads), "results": results}
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report
