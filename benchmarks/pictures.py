"""Measure how many pictures a second and core become what a tower reads: ours, exact and fast, against LLaVA's path.

    python -m benchmarks.pictures [--json FILE] [--quick] [--rounds N] [--llava FOLDER --python-path FOLDER]

LLaVA's path is built from its parts: Pillow decodes, the picture is put on a square of the mean colour (`pad`), the
image processor of transformers resizes, cuts and normalises it in NumPy. Ours makes bytes, which the tower normalises
on its device; that step is timed here too, so that all end alike. Pictures are drawn JPEGs of 640 x 480; one thread;
seconds are those of the processor.
With --llava the original package `llava` of that folder is called too, in a process of its own, on the libraries of
--python-path (transformers 4.37): slower than the processor of today, and what its users have.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.timing import arguments, interleave, summary, write_result
from llava_lite import pictures as ours
from llava_lite.jpeg import find_decoder
from llava_lite.picture_steps import read_steps

SIZE = (640, 480)
BASE = "LLaVA's path"
SIDES = (336, 224)
ORIGINAL = "LLaVA's own code"
# What the other process runs: it knows neither this package nor its transformers.
CHILD = """
import sys, time
from types import SimpleNamespace
import torch
from PIL import Image
from llava.mm_utils import process_images
from transformers import CLIPImageProcessor
torch.set_num_threads(1)
side, aspect_ratio, paths = int(sys.argv[1]), sys.argv[2], sys.argv[4:]
processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
config = SimpleNamespace(image_aspect_ratio=aspect_ratio)
make = lambda path: process_images([Image.open(path).convert("RGB")], processor, config)[0]
torch.save(torch.stack([make(path) for path in paths[:4]]), sys.argv[3])
print("ready", flush=True)
for line in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    for path in paths:
        make(path)
    print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)
"""


def draw(folder: Path, count: int) -> list[str]:
    """Draw slopes with some noise, as photographs have them, and return their files, of about 100 KB each."""
    width, height = SIZE
    paths = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        coarse = random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)).astype(int)
        pixels = (smooth + random.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        paths.append(str(folder / f"{seed}.jpg"))
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


def as_llava(path: str, processor, aspect_ratio: str) -> torch.Tensor:
    """Return a picture as LLaVA's data set makes it."""
    picture = Image.open(path).convert("RGB")
    if aspect_ratio == "pad":
        picture = ours.expand2square(picture, tuple(int(255 * mean) for mean in processor.image_mean))
    return processor.preprocess(picture, return_tensors="pt")["pixel_values"][0]


def as_ours(path: str, steps, aspect_ratio: str, resize: str) -> torch.Tensor:
    """Return a picture as our data set makes it, in bytes, and as the tower then normalises it."""
    return steps.normalise(ours.picture_bytes(ours.open_picture(path), steps, aspect_ratio, resize=resize))


def by_pillow(path: str, *how) -> torch.Tensor:
    """Return as_ours' without any other library to decode with."""
    read_jpeg, ours.read_jpeg = ours.read_jpeg, lambda *args: None
    try:
        return as_ours(path, *how)
    finally:
        ours.read_jpeg = read_jpeg


def makers(processor, aspect_ratio: str) -> dict:
    """Return {name: function, path -> picture}, LLaVA's path first."""
    steps = read_steps(processor)
    found = {BASE: lambda path: as_llava(path, processor, aspect_ratio)}
    for resize in ("exact", "fast"):
        found[f"{resize}, Pillow decodes"] = lambda path, resize=resize: by_pillow(path, steps, aspect_ratio, resize)
        if find_decoder() is not None:
            name = f"{resize}, {find_decoder().__module__.split('.')[0].strip('_')} decodes"
            found[name] = lambda path, resize=resize: as_ours(path, steps, aspect_ratio, resize)
    return found


class Original:
    """The original package in a process of its own: called, it makes all pictures and returns its seconds."""

    def __init__(self, folder: str, libraries: str | None, side: int, aspect_ratio: str, paths: list[str]):
        self.saved = str(Path(paths[0]).with_suffix(".pt"))
        places = os.pathsep.join(place for place in (libraries, folder) if place)
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(side), aspect_ratio, self.saved, *paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": places},
            cwd=Path(paths[0]).parent,
        )
        while (line := self.process.stdout.readline()) != "ready\n":
            if not line:
                raise RuntimeError(f"the original in {folder} does not run here; it ended with {self.process.wait()}.")

    def __call__(self) -> tuple[float, float]:
        """Return its wall and processor seconds for all pictures."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        wall_s, cpu_s = map(float, self.process.stdout.readline().split())
        return wall_s, cpu_s

    def close(self) -> None:
        """Let the process end."""
        self.process.stdin.close()
        self.process.wait()


def errors(found: dict, paths: list[str]) -> dict[str, float]:
    """Return the mean distance of each runner's pictures from LLaVA's path's, normalised."""
    expected = [found[BASE](path) for path in paths]
    distances = {}
    for name, make in found.items():
        made = [make(path) for path in paths]
        distances[name] = float(np.mean([(a - b).abs().mean() for a, b in zip(made, expected, strict=True)]))
    return distances


def measure(side: int, aspect_ratio: str, paths: list[str], args) -> dict:
    """Return the figures of each runner at one size of a tower and one aspect ratio."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    found = makers(processor, aspect_ratio)
    distances = errors(found, paths[:4])

    def runner(make):
        def run():
            for path in paths:
                make(path)

        return run

    runners = {name: runner(make) for name, make in found.items()}
    if args.llava:
        runners[ORIGINAL] = Original(args.llava, args.python_path, side, aspect_ratio, paths)
        expected = torch.stack([found[BASE](path) for path in paths[:4]])
        distances[ORIGINAL] = float((torch.load(runners[ORIGINAL].saved) - expected).abs().mean())
    samples = interleave(runners, args.rounds, again=BASE)
    figures = summary(samples, BASE, len(paths))
    if args.llava:
        runners[ORIGINAL].close()
        for name, one in summary(samples, ORIGINAL, len(paths)).items():
            figures[name]["ratio_cpu_to_original"] = one["ratio_cpu"]
    for name, one in figures.items():
        one["distance"] = distances[name]
    return figures


def add_flags(parser) -> None:
    """Add the flags of this benchmark alone."""
    parser.add_argument("--llava", help="folder that holds the original package `llava`")
    parser.add_argument("--python-path", help="folder with the libraries that it needs, transformers 4.37 among them")


def main(argv=None) -> dict:
    """Draw, measure, print, write."""
    args = arguments(__doc__.splitlines()[0], argv, add_flags)
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = draw(Path(folder), 4 if args.quick else 40)
        for side in SIDES:
            for aspect_ratio in ("pad", "square"):
                name = f"{side} px, {aspect_ratio}"
                results[name] = measure(side, aspect_ratio, paths, args)
                print(name)
                for runner, one in results[name].items():
                    again = f", itself {one['self_ratio_cpu']:.2f}" if "self_ratio_cpu" in one else ""
                    if args.llava:
                        again += f", {one['ratio_cpu_to_original']:.2f}x the original"
                    print(
                        f"  {runner:28} {1 / one['cpu_s_per_unit']:6.0f} pictures a CPU second, "
                        f"{one['ratio_cpu']:.2f}x{again}, distance {one['distance']:.1e}"
                    )
    settings = {"num_pictures": len(paths), "rounds": args.rounds, "size": SIZE, "quick": args.quick}
    return write_result("pictures", results, args.json, 1, **settings)


if __name__ == "__main__":
    main()
