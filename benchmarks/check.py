"""Measure how fast `llava-lite check` finds out whether image files are there and as they were, beside rivals.

    python -m benchmarks.check [--json FILE] [--quick] [--rounds N] [--files N] [--directory DIR]

Small JPEG files in directories of 1,000, and a record for each, are generated and deleted at the end; the files stay
in the page cache. In one process and by turns: the check of files that were checked before (the first index is built
before), os.path.isfile of each path alone, which is what a check costs at least, and Pillow's look at each header,
which is what finding out without an index costs. Rates are files a second of wall time.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from PIL import Image

from benchmarks.timing import arguments, interleave, summary, write_result
from llava_lite.data.check.check import NUM_THREADS
from llava_lite.data.check.image_meter import ImageMeter
from llava_lite.data.check.image_names import open_names
from llava_lite.data.check.recheck import StampedMeter, recheck_images
from llava_lite.data.index.annotations import IMAGE_COLUMNS, open_annotations
from llava_lite.media.layout import ImageLayout

NUM_FILES = 100_000
FILES_PER_DIRECTORY = 1000
TABLE = "images-benchmark"
OURS, EXISTS, HEADERS = "llava-lite", "os.path.isfile", "Pillow's headers"


def write_files(directory: Path, num_files: int) -> list[str]:
    """Write JPEG files of 1 KB and the records that name them; return the paths."""
    image = Image.effect_noise((32, 32), 50)
    paths, records = [], []
    for i in range(num_files):
        name = f"{i // FILES_PER_DIRECTORY:04d}/{i:07d}.jpg"
        path = directory / "images" / name
        if i % FILES_PER_DIRECTORY == 0:
            path.parent.mkdir(parents=True)
        if i == 0:
            image.save(path)
            data = path.read_bytes()
        path.write_bytes(data)
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Noise."}]
        records.append({"id": str(i), "image": name, "conversations": turns})
        paths.append(str(path))
    (directory / "train.json").write_text(json.dumps(records))
    return paths


def read_headers(paths: list[str]) -> None:
    """Read the size of each image from its header."""
    for path in paths:
        with Image.open(path) as image:
            assert image.size


def look_for(paths: list[str]) -> None:
    """Look whether each file exists."""
    assert all(map(os.path.isfile, paths))


def measure(directory: Path, num_files: int, rounds: int) -> dict:
    """Return the figures of each runner, with ratios over Pillow's headers; `rate` is files a second."""
    paths = write_files(directory, num_files)
    options = {"cache_dir": str(directory / "index")}
    annotations = open_annotations(str(directory / "train.json"), str(directory / "images"), **options)
    meter = StampedMeter(ImageMeter(ImageLayout(16)))
    annotations.complete(TABLE, IMAGE_COLUMNS, meter, "checking images", per_image=True, num_threads=NUM_THREADS)
    for file in annotations.files:
        open_names(file)

    def recheck():
        # As at a new start, nothing is known about the directories.
        assert not recheck_images(annotations, TABLE, StampedMeter(ImageMeter(ImageLayout(16))), NUM_THREADS)

    runners = {
        HEADERS: lambda: read_headers(paths),
        OURS: recheck,
        EXISTS: lambda: look_for(paths),
    }
    samples = interleave(runners, rounds, again=OURS)
    return summary(samples, HEADERS, num_files)


def add_flags(parser) -> None:
    """Add the flags of this benchmark alone."""
    parser.add_argument("--files", type=int, default=NUM_FILES, help=f"image files (default: {NUM_FILES:,})")
    parser.add_argument("--directory", help="directory for them; default: that of temporary files")


def main(argv=None) -> dict:
    """Generate files, measure, print, and return what is written to --json."""
    args = arguments(__doc__.splitlines()[0], sys.argv[1:] if argv is None else argv, add_flags)
    num_files = min(args.files, 2000) if args.quick else args.files
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        results = measure(Path(directory), num_files, args.rounds)
    for name, one in results.items():
        low, high = one["ratio_range"]
        print(f"{name:18} {one['rate']:9,.0f} files/s, {one['ratio']:5.2f} ({low:.2f}-{high:.2f}) of {HEADERS}")
    return write_result("check", results, args.json, 1, num_files=num_files, rounds=args.rounds, quick=args.quick)


if __name__ == "__main__":
    main()
