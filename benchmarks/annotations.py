"""Measure how annotations are opened and read: our index, json.load as LLaVA's ranks do, and `datasets` from Arrow.

    python -m benchmarks.annotations [--json FILE] [--quick] [--rounds N] [--records N] [--directory DIR]

A file like LLaVA-1.5's mixture, 665,298 records and 1.2 GB, is generated and deleted at the end. Each runner opens it
alone in its own process, every round in another order, with the file in the page cache: seconds until the records can
be read, then 20,000 random records. Memory is the dirty private pages of the process, and their increase by opening;
json.load runs only where there is memory for it, `datasets` where it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.alone import run_alone
from benchmarks.timing import arguments, write_result

NUM_RECORDS = 665_298
NUM_READS = 20_000
# The fraction of the mixture that has an image.
IMAGE_FRACTION = 0.94
WORDS = ["the", "a", "image", "shows", "of", "two", "people", "street", "left", "what", "colour", "near", "standing"]
WORDS += ["is", "in", "background", "building", "could", "be", "seen", "with", "and", "which", "visible", "holding"]
# Bytes of memory for a byte of JSON, as Python objects.
OBJECT_BYTES = 3.2


def write_records(path: Path, num_records: int) -> None:
    """Generate records with images and turns, 1,730 bytes each on average."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 60))) for _ in range(4000)]
    with path.open("w", encoding="utf-8") as file:
        for i in range(num_records):
            turns = []
            for _ in range(draw.choice((2, 3, 4, 5, 6))):
                turns.append({"from": "human", "value": draw.choice(texts)})
                turns.append({"from": "gpt", "value": draw.choice(texts)})
            record = {"id": f"{i:012d}", "conversations": turns}
            if draw.random() < IMAGE_FRACTION:
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
                record["image"] = f"coco/train2017/{i:012d}.jpg"
            file.write(("[" if i == 0 else ",\n") + json.dumps(record))
        file.write("]\n")


def private_bytes() -> int:
    """Return the bytes of the dirty private pages of this process."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup names no Private_Dirty.")


def open_ours(path: str, directory: str):
    """Return the records through the index on disk."""
    from llava_lite.data.index.annotations import open_annotations

    return lambda: open_annotations(path, "images", cache_dir=f"{directory}/index")


def open_json(path: str, directory: str):
    """Return the records as a list of Python objects."""

    def load():
        with open(path, encoding="utf-8") as file:
            return json.load(file)

    return load


def open_arrow(path: str, directory: str):
    """Return the records as a dataset of `datasets`, converted to Arrow the first time."""
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    import datasets

    return lambda: datasets.load_dataset("json", data_files=path, split="train", cache_dir=f"{directory}/arrow")


RUNNERS = {"llava-lite": open_ours, "json.load": open_json, "datasets": open_arrow}


def child(name: str, path: str, directory: str) -> dict:
    """Return seconds and memory of opening and reading in this process."""
    load = RUNNERS[name](path, directory)
    before, start_s = private_bytes(), time.perf_counter()
    records = load()
    open_s = time.perf_counter() - start_s
    opened = private_bytes()
    chosen = random.Random(1).choices(range(len(records)), k=NUM_READS)
    cpu_s, start_s = time.process_time(), time.perf_counter()
    for i in chosen:
        records[i]
    read_s = time.perf_counter() - start_s
    return {
        "open_s": open_s,
        "record_us": read_s / NUM_READS * 1e6,
        "record_cpu_us": (time.process_time() - cpu_s) / NUM_READS * 1e6,
        "private_bytes_opened": opened - before,
        "private_bytes": private_bytes() - before,
        "private_bytes_of_process": private_bytes(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def call(name: str, path: Path, directory: Path) -> dict:
    """Return what `child` reports from its own process."""
    return run_alone("benchmarks.annotations", "--child", name, str(path), str(directory))


def free_bytes() -> int:
    """Return the memory that is available to a new process."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def measure(path: Path, directory: Path, rounds: int) -> dict:
    """Return {runner: medians and the values of each round}; `first_open_s` includes building index or Arrow file."""
    fits = path.stat().st_size * OBJECT_BYTES * 1.5 < free_bytes()
    absent = {"json.load": not fits, "datasets": importlib.util.find_spec("datasets") is None}
    names = [name for name in RUNNERS if not absent.get(name)]
    first = {name: call(name, path, directory)["open_s"] for name in names}
    each = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            each[name].append(call(name, path, directory))
    return {
        name: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        | {"first_open_s": first[name], "each": runs}
        for name, runs in each.items()
    }


def add_flags(parser) -> None:
    """Add the flags of this benchmark alone."""
    parser.add_argument("--records", type=int, default=NUM_RECORDS, help="records of the generated file")
    parser.add_argument("--directory", help="directory for it, 4 GB; default: that of temporary files")


def main(argv=None) -> dict:
    """Generate records, measure, print, and return what is written to --json."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        print(json.dumps(child(*argv[1:])))
        return {}
    args = arguments(__doc__.splitlines()[0], argv, add_flags, rounds=3)
    num_records = min(args.records, 2000) if args.quick else args.records
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        path = Path(directory) / "train.json"
        write_records(path, num_records)
        num_bytes = path.stat().st_size
        results = measure(path, Path(directory), args.rounds)
    for name, one in results.items():
        print(
            f"{name:12} open {one['open_s']:7.2f} s (first {one['first_open_s']:.1f}), "
            f"{one['record_us']:6.1f} us per record, {one['private_bytes'] / 1e6:7.1f} MB private"
        )
    settings = {"num_records": num_records, "file_bytes": num_bytes, "num_reads": NUM_READS, "rounds": args.rounds}
    settings["quick"] = args.quick
    return write_result("annotations", results, args.json, 1, **settings)


if __name__ == "__main__":
    main()
