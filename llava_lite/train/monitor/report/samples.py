"""Keep small copies of the images that a run's evaluation answers, and read them and the answers back."""

import base64
import io
import logging
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from llava_lite.data.errors import DataError
from llava_lite.train.monitor.log_lines import GENERATIONS, is_number
from llava_lite.train.monitor.report.files import RunFiles

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


def read_samples(files: RunFiles, images: dict) -> list[dict]:
    """Return the answers of a run by record, each {"id", "prompt", "expected", "answers": [(step, answer)], ...}.

    Its "images" are data URLs, "lost" has a sentence for each image that cannot be shown. images: of run.json. A step
    that a resumed run answered again counts once, as it was answered last.
    """
    samples = {}
    for line in files.read_lines(GENERATIONS):
        if "answer" not in line:
            continue
        key = (str(line.get("id")), str(line.get("prompt", "")))
        sample = samples.setdefault(key, {"id": key[0], "prompt": key[1], "answers": {}})
        sample["expected"] = str(line.get("expected", ""))
        step = line.get("step")
        sample["answers"][step if is_number(step) else 0] = str(line["answer"])
    for sample in samples.values():
        sample["answers"] = sorted(sample["answers"].items())
        names = images.get(sample["id"])
        found = [read_image(files.directory, name) for name in (names if isinstance(names, list) else [])]
        sample["images"] = [url for url, _ in found if url]
        sample["lost"] = [fault for _, fault in found if fault]
    return list(samples.values())


def read_image(run_dir: Path, name) -> tuple[str | None, str | None]:
    """Return an image of a run as a data URL, made again from its pixels, and what is wrong with it; one is None."""
    # Only what lies in the directory itself.
    path = run_dir / DIRECTORY / Path(str(name)).name
    shown = f"{DIRECTORY}/{path.name}"
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            return None, f"{shown} is not shown: it has {size:,} bytes, at most {MOST_BYTES:,} are."
        with Image.open(path, formats=("JPEG",)) as image:
            image.thumbnail((SIDE, SIDE))
            file = io.BytesIO()
            image.convert("RGB").save(file, "JPEG", quality=80)
    except FileNotFoundError:
        return None, f"{shown} is missing."
    except UnidentifiedImageError:
        return None, f"{shown} is damaged (no JPEG)."
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # An error of the disk has a number; one of the image has none.
        what = "cannot be read" if getattr(error, "errno", None) else "is damaged"
        return None, f"{shown} {what} ({getattr(error, 'strerror', None) or error})."
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}", None
