"""Keep small copies of the images that a run's evaluation answers, and read them and the answers back."""

import base64
import io
import logging
from pathlib import Path

from PIL import Image

from llava_lite.data.errors import DataError
from llava_lite.train.monitor.generations import GENERATIONS
from llava_lite.train.monitor.run_log import read_metrics

logger = logging.getLogger(__name__)

DIRECTORY = "samples"
# Longest side of a copy, in pixels, and the most bytes of one that a page takes.
SIDE, MOST_BYTES = 320, 2**18


def save_images(eval_set, examples, output_dir: Path) -> dict[str, list[str]]:
    """Write the images of evaluation examples to samples/, and return {id of the record: names of its files}.

    examples: in the order of the set, as `readable_examples` returns them. A record without images, with sound or
    points, or whose image cannot be opened now, has none.
    """
    names, k = {}, 0
    for i in range(len(eval_set) if examples else 0):
        if k == len(examples):
            break
        try:
            record = eval_set.annotations[i]
        except DataError:
            continue
        if record.id != examples[k]["id"]:
            continue
        names[record.id] = save_record(eval_set, record, Path(output_dir) / DIRECTORY, k)
        k += 1
    return {record_id: files for record_id, files in names.items() if files}


def save_record(eval_set, record, directory: Path, number: int) -> list[str]:
    """Write the images of a record; return the names of the files."""
    names = []
    try:
        for j, source in enumerate(record.images):
            image = eval_set.open(record, source)
            if isinstance(image, Image.Image):
                directory.mkdir(exist_ok=True)
                small = image.convert("RGB")
                small.thumbnail((SIDE, SIDE))
                small.save(directory / f"{number}_{j}.jpg", quality=85)
                names.append(f"{number}_{j}.jpg")
    except (DataError, OSError, ValueError) as error:
        logger.warning("the report shows no image of %s: %s", record.name, error)
    return names


def read_samples(run_dir: Path, images: dict) -> list[dict]:
    """Return the answers of a run by record, each {"id", "prompt", "expected", "answers": [(step, answer)], "images"}.

    images: of run.json. A step that a resumed run answered again counts once, as it was answered last.
    """
    samples = {}
    for line in read_metrics(run_dir / GENERATIONS):
        if not isinstance(line, dict) or "answer" not in line:
            continue
        key = (str(line.get("id")), str(line.get("prompt", "")))
        sample = samples.setdefault(key, {"id": key[0], "prompt": key[1], "answers": {}})
        sample["expected"] = str(line.get("expected", ""))
        sample["answers"][line.get("step", 0)] = str(line["answer"])
    for sample in samples.values():
        sample["answers"] = sorted(sample["answers"].items())
        names = images.get(sample["id"], []) if isinstance(images, dict) else []
        sample["images"] = [url for name in names if (url := data_url(run_dir / DIRECTORY / Path(str(name)).name))]
    return list(samples.values())


def data_url(path: Path) -> str | None:
    """Return an image as a data URL, made again from its pixels; None for what is missing, no image, or huge."""
    try:
        if path.stat().st_size > MOST_BYTES:
            return None
        with Image.open(path, formats=("JPEG",)) as image:
            image.thumbnail((SIDE, SIDE))
            file = io.BytesIO()
            image.convert("RGB").save(file, "JPEG", quality=80)
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
