"""What files of small benchmarks are made of: images of one colour, lines of JSON, tables of Hugging Face."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from llava_lite.eval.asking import read_images
from llava_lite.eval.benchmarks import get_benchmark
from llava_lite.eval.benchmarks.base import Options


def png(colour: int, size: tuple[int, int] = (6, 4)) -> bytes:
    """Return the file of an image whose red is `colour`."""
    stream = io.BytesIO()
    Image.new("RGB", size, (colour, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_images(directory: Path, **colours: int) -> None:
    """Write NAME.png of each colour."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, colour in colours.items():
        (directory / f"{name}.png").write_bytes(png(colour))


def write_lines(path: Path, items) -> Path:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def write_json(path: Path, value) -> Path:
    """Write a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_table(path: Path, rows: list[dict], images: tuple[str, ...] = ("image",)) -> Path:
    """Write a table of Hugging Face as parquet; columns `images` hold bytes of image files, lists of them, or None."""
    from datasets import Dataset, List
    from datasets import Image as ImageFeature

    def stored(value):
        return [stored(one) for one in value] if isinstance(value, list) else value and {"bytes": value, "path": None}

    images = [name for name in images if name in rows[0]]
    table = Dataset.from_list([row | {name: stored(row[name]) for name in images} for row in rows])
    for name in images:
        feature = ImageFeature()
        table = table.cast_column(name, List(feature) if isinstance(rows[0][name], list) else feature)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(str(path))
    return path


def load(name: str, directory: Path, split=None, variant=None, **more):
    """Return (benchmark, options, questions) of a benchmark by name."""
    benchmark = get_benchmark(name)
    options = Options(benchmark.choose(split, "split"), benchmark.choose(variant, "variant"), **more)
    return benchmark, options, benchmark.load(directory, options)


def reds(question) -> list[int]:
    """Return the red of each image that the model would see."""
    return [image.getpixel((0, 0))[0] for image in read_images(question)]
