"""Turn image files into the tower's input and measure images per CPU second: ours, exact and fast, LLaVA's path.

    python -m benchmarks.images [--json FILE] [--quick] [--rounds N] [--llava DIRECTORY --python-path DIRECTORY]

LLaVA's path is built from its parts: Pillow decodes, the image is put on a square of the mean colour (`pad`),
transformers' image processor resizes, crops and normalises it in NumPy. Ours makes bytes, which the tower normalises
on its device; that step is timed here too, so that all end with the same tensor. The images are generated JPEGs of
640 x 480; one thread; CPU seconds.
With --llava the original package `llava` of that directory runs too, in its own process, with the libraries of
--python-path (transformers 4.37): slower than today's processor, and what its users have.
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
from llava_lite.media import preprocess as ours
from llava_lite.media.image import open_image
from llava_lite.media.transform import read_transform

SIZE = (640, 480)
BASE = "LLaVA's path"
SIDES = (336, 224)
ORIGINAL = "LLaVA's own code"
# Runs in the other process, with another transformers and without this package.
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


def draw(directory: Path, count: int) -> list[str]:
    """Generate smooth images with some noise, like photographs; return their files, of about 100 KB each."""
    width, height = SIZE
    paths = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        coarse = random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)).astype(int)
        pixels = (smooth + random.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        paths.append(str(directory / f"{seed}.jpg"))
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


def as_llava(path: str, processor, aspect_ratio: str) -> torch.Tensor:
    """Return an image as LLaVA's dataset makes it."""
    image = Image.open(path).convert("RGB")
    if aspect_ratio == "pad":
        image = ours.expand2square(image, tuple(int(255 * mean) for mean in processor.image_mean))
    return processor.preprocess(image, return_tensors="pt")["pixel_values"][0]


def as_ours(path: str, steps, aspect_ratio: str, resize: str) -> torch.Tensor:
    """Return an image as our dataset makes it, in bytes, then normalised as the tower does."""
    return steps.normalise(ours.image_bytes(open_image(path), steps, aspect_ratio, resize=resize))


def makers(processor, aspect_ratio: str) -> dict:
    """Return {name: function, path -> image}, LLaVA's path first."""
    steps = read_transform(processor)
    found = {BASE: lambda path: as_llava(path, processor, aspect_ratio)}
    for resize in ("exact", "fast"):
        found[resize] = lambda path, resize=resize: as_ours(path, steps, aspect_ratio, resize)
    return found


class Original:
    """The original package in its own process: a call processes all images and returns the seconds."""

    def __init__(self, directory: str, libraries: str | None, side: int, aspect_ratio: str, paths: list[str]):
        self.saved = str(Path(paths[0]).with_suffix(".pt"))
        paths_of_python = os.pathsep.join(path for path in (libraries, directory) if path)
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(side), aspect_ratio, self.saved, *paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": paths_of_python},
            cwd=Path(paths[0]).parent,
        )
        while (line := self.process.stdout.readline()) != "ready\n":
            if not line:
                raise RuntimeError(
                    f"the original in {directory} does not run here; it ended with {self.process.wait()}."
                )

    def __call__(self) -> tuple[float, float]:
        """Return its wall and processor seconds for all images."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        wall_s, cpu_s = map(float, self.process.stdout.readline().split())
        return wall_s, cpu_s

    def close(self) -> None:
        """Let the process end."""
        self.process.stdin.close()
        self.process.wait()


def errors(found: dict, paths: list[str]) -> dict[str, float]:
    """Return each runner's mean distance from LLaVA's path, in normalised pixel values."""
    expected = [found[BASE](path) for path in paths]
    distances = {}
    for name, make in found.items():
        made = [make(path) for path in paths]
        distances[name] = float(np.mean([(a - b).abs().mean() for a, b in zip(made, expected, strict=True)]))
    return distances


def measure(side: int, aspect_ratio: str, paths: list[str], args) -> dict:
    """Return the figures of each runner for one input size of a tower and one aspect ratio."""
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
    parser.add_argument("--llava", help="directory that holds the original package `llava`")
    parser.add_argument(
        "--python-path", help="directory with the libraries that it needs, transformers 4.37 among them"
    )


def main(argv=None) -> dict:
    """Generate images, measure, print, and return what is written to --json."""
    args = arguments(__doc__.splitlines()[0], argv, add_flags)
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        paths = draw(Path(directory), 4 if args.quick else 40)
        for side in SIDES:
            for aspect_ratio in ("pad", "square"):
                name = f"{side} px, {aspect_ratio}"
                results[name] = measure(side, aspect_ratio, paths, args)
                print(name)
                for runner, one in results[name].items():
                    again = f", over itself {one['self_ratio_cpu']:.2f}" if "self_ratio_cpu" in one else ""
                    if args.llava:
                        again += f", {one['ratio_cpu_to_original']:.2f}x the original"
                    print(
                        f"  {runner:28} {1 / one['cpu_s_per_unit']:6.0f} images per CPU second, "
                        f"{one['ratio_cpu']:.2f}x{again}, distance {one['distance']:.1e}"
                    )
    settings = {"num_images": len(paths), "rounds": args.rounds, "size": SIZE, "quick": args.quick}
    return write_result("images", results, args.json, 1, **settings)


if __name__ == "__main__":
    main()
