"""Write what the readers of other formats find as a file in LLaVA's format, and count what was left out."""

import io
import json
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from llava_lite.data.cache import key_of
from llava_lite.data.check_report import number
from llava_lite.data.converters.base import Found, Options
from llava_lite.data.converters.readers import read_foreign
from llava_lite.data.picture_files import find_picture, inspect_picture
from llava_lite.data.records import Record, missing_images, parse_record
from llava_lite.data.scan import DataError
from llava_lite.pictures import PictureError

# Reasons that are listed, and examples of each.
NUM_REASONS = 20
# A file of which so many records are left out, and none is written, is not read to its end.
LEAST_JUDGED = 1000
SUFFIXES = {
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif",
}
SUFFIXES |= {"PPM": ".ppm", "JPEG2000": ".jp2", "AVIF": ".avif"}


class Written(NamedTuple):
    """What a conversion did. left_out: reason without names -> (count, the first one). notes, said: of Options."""

    num_records: int
    num_with_image: int
    num_images: int  # written, equal ones once
    image_folder: str | None  # where the image paths of the file start
    left_out: dict[str, tuple[int, str]]
    notes: Counter
    said: list[str]

    def lines(self, path: str) -> list[str]:
        """Return what is printed in the end."""
        lines = [f"wrote {number(self.num_records, 'record')}, {self.num_with_image:,} with images, to {path}"]
        if self.num_images:
            lines.append(f"wrote {number(self.num_images, 'image')} below {self.image_folder}")
        lines += [f"{count:,} {note}" for note, count in sorted(self.notes.items()) if count]
        lines += self.said
        if self.left_out:
            lines.append(f"left out {sum(count for count, _ in self.left_out.values()):,}:")
            reasons = sorted(self.left_out.values(), key=lambda pair: -pair[0])
            lines += [f"  {count:,} x {example}" for count, example in reasons[:NUM_REASONS]]
            if len(reasons) > NUM_REASONS:
                lines.append(f"  ... and {len(reasons) - NUM_REASONS:,} other reasons")
        return lines


class ImageWriter:
    """Writes the images that records hold into a directory, under a name made of their content.

    folder: where; image_folder: where the paths of records start, which may be a directory around it.
    """

    def __init__(self, folder: Path, image_folder: str | None):
        self.folder = folder
        is_inside = image_folder is not None and folder.resolve().is_relative_to(Path(image_folder).resolve())
        self.root = Path(image_folder) if is_inside else folder
        self.written = set()

    def write(self, data: bytes) -> str:
        """Return the path of an image below `root`; PictureError if it cannot be used."""
        inspect_picture(data)
        key = key_of(data)
        path = self.folder / key[:2] / f"{key}{_suffix(data)}"
        if key not in self.written:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            self.written.add(key)
        return os.path.relpath(path.resolve(), self.root.resolve())


def _suffix(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        return SUFFIXES.get(image.format, ".img")


def to_item(record: Record, images: list[str]) -> dict:
    """Return LLaVA's object of a record, under the keys that parse_record reads back."""
    turns = []
    for position, (role, text) in enumerate(record.turns):
        unlearned = {"loss": False} if position in record.not_supervised else {}
        turns.append({"from": role, "value": text, **unlearned})
    item = {"id": record.id}
    if images:
        item["image"] = images[0] if len(images) == 1 else images
    if record.system is not None:
        # As a turn: an empty one replaces the system text of the template too.
        turns.insert(0, {"from": "system", "value": record.system})
    return {**item, "conversations": turns}


class Converter:
    """Makes the objects of a file, and counts what is left out. placeholder_as_text: see missing_images."""

    def __init__(self, options: Options, images: ImageWriter, placeholder_as_text: bool = False):
        self.options, self.images, self.placeholder_as_text = options, images, placeholder_as_text
        self.left_out = defaultdict(lambda: (0, ""))
        self.num_records = self.num_with_image = 0
        self.kinds = set()  # "paths" and "bytes", as records hold them

    def item(self, found: Found | tuple[str, Record]) -> dict | None:
        """Return the object to write, or None if it is left out."""
        try:
            record = self._record(found)
            images = [self._image(record, image) for image in record.images]
        except (DataError, PictureError) as error:
            self._leave_out(str(error))
            return None
        self.num_records += 1
        self.num_with_image += bool(images)
        return to_item(record, images)

    def _record(self, found: Found | tuple[str, Record]) -> Record:
        if not isinstance(found, Found):
            record = found[1]
        elif found.item is None:
            raise DataError(found.reason)
        else:
            record = parse_record(found.item, found.where)
        reason = None if self.placeholder_as_text else missing_images(record)
        if reason is not None:
            raise DataError(reason)
        return record

    def _image(self, record: Record, image: str | bytes) -> str:
        self.kinds.add("bytes" if isinstance(image, bytes) else "paths")
        try:
            if isinstance(image, bytes):
                return self.images.write(image)
            if self.options.image_folder is not None or "://" in image:
                find_picture(self.options.image_folder or ".", image)
            return image
        except PictureError as error:
            raise DataError(f"{record.name}: {error}") from error

    def _leave_out(self, reason: str) -> None:
        # The same reason of other records: without what stands in quotes, and without numbers.
        kind = re.sub(r"'[^']*'|\([^()]*\[\d+\]\)|\d[\d,.]*", "", reason)
        count, example = self.left_out[kind]
        self.left_out[kind] = (count + 1, example or reason)
        num_left_out = sum(count for count, _ in self.left_out.values())
        if not self.num_records and num_left_out == LEAST_JUDGED:
            raise DataError(f"none of the first {num_left_out:,} records can be converted; the last: {reason}")


def convert(
    path: str, out: str, options: Options, image_out: str | None = None, placeholder_as_text: bool = False
) -> Written:
    """Write the records of a file or directory in any known format to `out`, a .json or .jsonl file.

    image_out: where images go that the records themselves hold; default: `<out without suffix>_images`. Nothing is
    written to `out` if no record can be.
    """
    if not out.endswith((".json", ".jsonl")):
        raise DataError(f"{out}: the file to write ends in .json or .jsonl.")
    if os.path.exists(out):
        raise DataError(f"{out} exists already; remove it, or name another file.")
    folder = Path(image_out or f"{os.path.splitext(out)[0]}_images")
    converter = Converter(options, ImageWriter(folder, options.image_folder), placeholder_as_text)
    draft = f"{out}.{os.getpid()}.part"
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(draft, "w", encoding="utf-8") as file:
            _write(file, filter(None, map(converter.item, read_foreign(path, options))), out.endswith(".jsonl"))
        if converter.kinds == {"bytes", "paths"} and converter.images.root == folder:
            raise DataError(
                f"{path}: some records hold their images and others name files, which would start from two "
                "directories. Give --image_folder DIR, and --image_out DIR/SUBDIRECTORY for the images that are held."
            )
        if converter.num_records:
            os.replace(draft, out)
    finally:
        Path(draft).unlink(missing_ok=True)
    root = str(converter.images.root) if "bytes" in converter.kinds else options.image_folder
    return Written(
        converter.num_records,
        converter.num_with_image,
        len(converter.images.written),
        root if converter.num_with_image else None,
        dict(converter.left_out),
        options.notes,
        options.said,
    )


def _write(file, items, is_lines: bool) -> None:
    file.write("" if is_lines else "[\n")
    for position, item in enumerate(items):
        comma = ",\n" if position and not is_lines else ""
        file.write(comma + json.dumps(item, ensure_ascii=False) + ("\n" if is_lines else ""))
    file.write("" if is_lines else "\n]\n")
