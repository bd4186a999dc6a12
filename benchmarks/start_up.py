"""Measure the CPU seconds of the first commands of a user, each in its own process, by turns."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

from benchmarks.timing import arguments, interleave, summary, write_result

ROOT = Path(__file__).resolve().parents[1]
TRAINER = "torch and transformers' Trainer and LLaVA"
IMPORTS = "imports of a training run"
# What `llava-lite train` loads between its flags and its first step.
OF_A_RUN = (
    "train.train train.llava_trainer train.saving.final train.publish.card data.dataset data.collator model.builder "
    "processing.processor"
)
COMMANDS = {
    "python": ["-c", "pass"],
    "import llava_lite": ["-c", "import llava_lite"],
    "llava-lite --help": ["-m", "llava_lite.cli", "--help"],
    "llava-lite train --help": ["-m", "llava_lite.cli", "train", "--help"],
    TRAINER: ["-c", "import torch; from transformers import Trainer, LlavaForConditionalGeneration"],
    IMPORTS: ["-c", "import " + ", ".join(f"llava_lite.{name}" for name in OF_A_RUN.split())],
}
QUICK = ("python", "import llava_lite", "llava-lite --help")


def cpu_seconds(command: list[str]) -> float:
    """Return the CPU seconds, user and system, of python with these arguments; raise if it fails."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def measure(names, rounds: int) -> dict:
    """Return {command: figures}; the seconds are CPU seconds throughout."""
    runners = {name: lambda name=name: cpu_seconds(COMMANDS[name]) for name in names}
    base = TRAINER if TRAINER in names else names[0]
    found = summary(interleave(runners, rounds, again=base), base)
    figures = {
        name: {"cpu_s": one["wall_s"], "of_trainer": 1 / one["ratio"], "cpu_s_each": one["wall_s_each"]}
        for name, one in found.items()
    }
    figures[base] |= {key: found[base][key] for key in ("self_ratio", "self_range")}
    figures[base]["cpu_s_each_again"] = found[base]["wall_s_each_again"]
    return figures


def main(argv=None):
    """Print and write the figures."""
    args = arguments(__doc__.splitlines()[0], argv, rounds=3)
    results = measure(QUICK if args.quick else tuple(COMMANDS), args.rounds)
    for name, one in results.items():
        print(f"  {name:44} {one['cpu_s']:6.2f} CPU s  {one['of_trainer']:5.2f} of the base")
    return write_result("start_up", results, args.json, rounds=args.rounds, quick=args.quick)


if __name__ == "__main__":
    main()
