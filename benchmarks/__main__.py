"""Run every benchmark, print the table of gates, and write benchmarks/results/*.json, RESULTS.md and its plot.

    python -m benchmarks [--quick] [--only training ablation ...] [--llava FOLDER --python-path FOLDER]
    python -m benchmarks --report           nothing is run: the table from the results that are there

On two cores that nobody else uses training takes about a quarter of an hour, all of it twice that; parts can be run
apart by --only, since the table is made of all reports that lie in the folder. `python -m benchmarks.cuda_suite` is
for a GPU and started by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.results import write_page
from benchmarks.table import as_text, table

FOLDER = Path(__file__).resolve().parent
BENCHMARKS = ("start_up", "annotations", "pictures", "moe_layer", "generation", "training", "ablation")


def run(name: str, file: Path, flags: list[str]) -> bool:
    """Run a benchmark in a process of its own; return whether it wrote its report."""
    print(f"== {name}", flush=True)
    start_s = time.monotonic()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(file), *flags]
    code = subprocess.run(command, env=environment, check=False).returncode
    print(f"== {name}: {time.monotonic() - start_s:.0f} s{'' if code == 0 else f', ended with {code}'}\n", flush=True)
    return code == 0


def read_reports(folder: Path) -> dict:
    """Return {name: report} of the JSON files of a folder."""
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def refuse_odd_flags(parser, args) -> None:
    """End with a line that says what to do where a flag would have no effect, or the wrong one."""
    for flag in ("threads", "rounds"):
        number = getattr(args, flag)
        if number is not None and number < 1:
            parser.error(f"--{flag} {number}: at least 1")
    if args.python_path and not args.llava:
        parser.error("--python-path names libraries for the package of --llava; give that too")
    if args.llava and not Path(args.llava, "llava", "__init__.py").is_file():
        parser.error(f"--llava {args.llava}: holds no package `llava`; give the clone of LLaVA, in which it lies")
    if args.llava and not args.report and not {"training", "pictures"} & set(args.only):
        parser.error(f"--llava is for training and pictures; --only names {' '.join(args.only)}")


def main(argv=None) -> int:
    """Run, print, write; return 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), help="what is run")
    parser.add_argument("--report", action="store_true", help="run nothing; write the page from what lies there")
    parser.add_argument("--quick", action="store_true", help="toy sizes, into a folder of their own, no page")
    parser.add_argument("--threads", type=int, help="threads of torch; default: each benchmark's own")
    parser.add_argument("--rounds", type=int, help="interleaved rounds; default: each benchmark's own")
    parser.add_argument("--llava", help="folder that holds the original package `llava`, see benchmarks.training")
    parser.add_argument("--python-path", help="folder with the libraries that it needs")
    parser.add_argument("--results", type=Path, help="folder of the reports, and of the page")
    args = parser.parse_args(argv)
    refuse_odd_flags(parser, args)
    folder = args.results or FOLDER / ("results_quick" if args.quick else "results")
    failed = []
    for name in [] if args.report else args.only:
        flags = ["--quick"] if args.quick else []
        for key in ("threads", "rounds"):
            flags += [f"--{key}", str(getattr(args, key))] if getattr(args, key) else []
        if name in ("training", "pictures") and args.llava:
            flags += ["--llava", args.llava, *(["--python-path", args.python_path] if args.python_path else [])]
        if not run(name, folder / f"{name}.json", flags):
            failed.append(name)
    reports = read_reports(folder)
    if args.report and not reports:
        parser.error(f"--report: no reports in {folder}, and nothing to write a page from; run the benchmarks first")
    print(as_text(table(reports)))
    if args.quick:
        print("toy sizes: everything runs, and the figures say nothing.")
    else:
        print("written:", *write_page(reports, args.results or FOLDER))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
