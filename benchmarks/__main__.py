"""Run every benchmark, print the table of gates, and write benchmarks/results/*.json, RESULTS.md and its plot.

    python -m benchmarks [--quick] [--only training ablation ...] [--llava DIRECTORY --python-path DIRECTORY]
    python -m benchmarks --report           run nothing: the table from the reports that are there

On two quiet cores all of it takes about half an hour, --quick some minutes. --only runs some parts: the table is made
of all reports in the directory. `python -m benchmarks.cuda_suite` is for a GPU and is started separately.
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

DIRECTORY = Path(__file__).resolve().parent
BENCHMARKS = ("start_up", "annotations", "check", "images", "moe_layer", "generation", "training", "ablation")


def run(name: str, file: Path, flags: list[str]) -> bool:
    """Run a benchmark in its own process; return whether it wrote its report."""
    print(f"== {name}", flush=True)
    start_s = time.monotonic()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(DIRECTORY.parent), os.environ.get("PYTHONPATH", "")])
    }
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(file), *flags]
    code = subprocess.run(command, env=environment, check=False).returncode
    print(f"== {name}: {time.monotonic() - start_s:.0f} s{'' if code == 0 else f', ended with {code}'}\n", flush=True)
    return code == 0


def read_reports(directory: Path) -> dict:
    """Return {name: report} of the JSON files of a directory."""
    files = sorted(directory.glob("*.json")) if directory.is_dir() else []
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def check_flags(parser, args) -> None:
    """End with a message where a flag would have no effect, or the wrong one."""
    for flag in ("threads", "rounds"):
        number = getattr(args, flag)
        if number is not None and number < 1:
            parser.error(f"--{flag} {number}: at least 1")
    if args.python_path and not args.llava:
        parser.error("--python-path names libraries for the package of --llava; pass --llava too")
    if args.llava and not Path(args.llava, "llava", "__init__.py").is_file():
        parser.error(f"--llava {args.llava}: has no package `llava`; pass a clone of LLaVA")
    if args.llava and not args.report and not {"training", "images"} & set(args.only):
        parser.error(f"--llava is for training and images; --only names {' '.join(args.only)}")


def main(argv=None) -> int:
    """Run, print, write; return 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), help="benchmarks to run (default: all)"
    )
    parser.add_argument(
        "--report", action="store_true", help="run nothing; write the page from the reports that are there"
    )
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes and one round, in a separate directory, no page"
    )
    parser.add_argument("--threads", type=int, help="threads of torch (default: each benchmark's own)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default: each benchmark's own)")
    parser.add_argument("--llava", help="directory that holds the original package `llava`, see benchmarks.training")
    parser.add_argument("--python-path", help="directory with the libraries that it needs")
    parser.add_argument("--results", type=Path, help="directory of the reports, and of the page")
    args = parser.parse_args(argv)
    check_flags(parser, args)
    directory = args.results or DIRECTORY / ("results_quick" if args.quick else "results")
    failed = []
    for name in [] if args.report else args.only:
        flags = ["--quick"] if args.quick else []
        for key in ("threads", "rounds"):
            flags += [f"--{key}", str(getattr(args, key))] if getattr(args, key) else []
        if name in ("training", "images") and args.llava:
            flags += ["--llava", args.llava, *(["--python-path", args.python_path] if args.python_path else [])]
        if not run(name, directory / f"{name}.json", flags):
            failed.append(name)
    reports = read_reports(directory)
    if args.report and not reports:
        parser.error(f"--report: no reports in {directory}; run the benchmarks first")
    print(as_text(table(reports)))
    if args.quick:
        print("toy sizes: everything runs, but the figures mean nothing.")
    else:
        print("written:", *write_page(reports, args.results or DIRECTORY))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
