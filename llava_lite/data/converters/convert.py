"""Write the records of other formats to a file in LLaVA's format, and count those that are left out."""

import io
import json
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from llava_lite.data.check.report import number
from llava_lite.data.converters.base import Found, Options
from llava_lite.data.converters.readers import read_foreign
from llava_lite.data.errors import DataError
from llava_lite.data.image_files import find_image, inspect_image
from llava_lite.data.index.cache import get_key
from llava_lite.data.media_files import find_part
from llava_lite.data.records.media import MediaMix, get_mixes
from llava_lite.data.records.record import Record, missing_images, parse_record
from llava_lite.media.files import MediaError
from llava_lite.media.image import ImageError
from llava_lite.output_file import ESCAPED

# Reasons that are listed, each with an example.
NUM_REASONS = 20
# If so many records are left out and none is written, the rest of the file is not read.
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
    """The result of a conversion. left_out: reason without names -> (count, example). notes, remarks: of Options."""

    num_records: int
    num_with_image: int
    num_images: int  # written files, equal images once
    image_folder: str | None  # root of the image paths in the file
    left_out: dict[str, tuple[int, str]]
    notes: Counter
    remarks: list[str]

    def lines(self, path: str) -> list[str]:
        """Return the lines that the command prints."""
        lines = [f"wrote {number(self.num_records, 'record')}, {self.num_with_image:,} with images, to {path}"]
        if self.num_images:
            lines.append(f"wrote {number(self.num_images, 'image')} below {self.image_folder}")
        lines += [f"{count:,} {note}" for note, count in sorted(self.notes.items()) if count]
        lines += self.remarks
        if self.left_out:
            lines.append(f"left out {sum(count for count, _ in self.left_out.values()):,}:")
            reasons = sorted(self.left_out.values(), key=lambda pair: -pair[0])
            lines += [f"  {count:,} x {example}" for count, example in reasons[:NUM_REASONS]]
            if len(reasons) > NUM_REASONS:
                lines.append(f"  ... and {len(reasons) - NUM_REASONS:,} other reasons")
        return lines


class ImageWriter:
    """Writes the images that records hold as bytes into a directory, with names made of their content.

    directory: of the images. image_folder: root of the paths in records, which may contain that directory.
    """

    def __init__(self, directory: Path, image_folder: str | None):
        self.directory = directory
        is_inside = image_folder is not None and directory.resolve().is_relative_to(Path(image_folder).resolve())
        self.root = Path(image_folder) if is_inside else directory
        self.written = set()

    def write(self, data: bytes) -> str:
        """Return the path of an image below `root`; ImageError if it cannot be used."""
        inspect_image(data)
        key = get_key(data)
        path = self.directory / key[:2] / f"{key}{_suffix(data)}"
        if key not in self.written:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            self.written.add(key)
        return os.path.relpath(path.resolve(), self.root.resolve())


def _suffix(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        return SUFFIXES.get(image.format, ".img")


def to_item(record: Record, images: list[str | MediaMix]) -> dict:
    """Return LLaVA's object of a record, under the keys that parse_record reads back."""
    turns = []
    for position, (role, text) in enumerate(record.turns):
        unsupervised = {"loss": False} if position in record.not_supervised else {}
        turns.append({"from": role, "value": text, **unsupervised})
    item = {"id": record.id}
    if any(get_mixes(images)):
        item |= images[0].item()
    elif images:
        item["image"] = images[0] if len(images) == 1 else images
    if record.system is not None:
        # As a turn: an empty system text replaces that of the template too.
        turns.insert(0, {"from": "system", "value": record.system})
    return {**item, "conversations": turns}


class Converter:
    """Makes the objects of a file, and counts the records left out. placeholder_as_text: see missing_images."""

    def __init__(self, options: Options, images: ImageWriter, placeholder_as_text: bool = False):
        self.options, self.images, self.placeholder_as_text = options, images, placeholder_as_text
        self.left_out = defaultdict(lambda: (0, ""))
        self.num_records = self.num_with_image = 0
        self.kinds = set()  # "paths" and "bytes", as records hold them

    def item(self, found: Found | tuple[str, Record]) -> dict | None:
        """Return the object to write, None if the record is left out."""
        try:
            record = self._record(found)
            images = [self._image(record, image) for image in record.images]
        except (DataError, ImageError) as error:
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

    def _image(self, record: Record, image: str | bytes | MediaMix) -> str | MediaMix:
        self.kinds.add("bytes" if isinstance(image, bytes) else "paths")
        try:
            if isinstance(image, bytes):
                return self.images.write(image)
            if isinstance(image, MediaMix):
                for part in image.parts if self.options.image_folder is not None else ():
                    find_part(self.options.image_folder, part)
                return image
            if self.options.image_folder is not None or "://" in image:
                find_image(self.options.image_folder or ".", image)
            return image
        except (ImageError, MediaError) as error:
            raise DataError(f"{record.name}: {error}") from error

    def _leave_out(self, reason: str) -> None:
        # Without quoted texts and numbers, equal reasons of different records are equal.
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

    image_out: directory of images that the records themselves hold; default: `<out without suffix>_images`. `out` is
    not written if no record can be converted.
    """
    if not out.endswith((".json", ".jsonl")):
        raise DataError(f"{out}: the file to write ends in .json or .jsonl.")
    if os.path.exists(out):
        raise DataError(f"{out} exists already; remove it, or name another file.")
    directory = Path(image_out or f"{os.path.splitext(out)[0]}_images")
    converter = Converter(options, ImageWriter(directory, options.image_folder), placeholder_as_text)
    draft = f"{out}.{os.getpid()}.part"
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(draft, "w", encoding="utf-8", errors=ESCAPED) as file:
            _write(file, filter(None, map(converter.item, read_foreign(path, options))), out.endswith(".jsonl"))
        if converter.kinds == {"bytes", "paths"} and converter.images.root == directory:
            raise DataError(
                f"{path}: some records hold their images and others name files, so their paths would have "
                "two roots. Give --image_folder DIR, and --image_out DIR/SUBDIRECTORY for the images held by records."
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
        options.remarks,
    )


def _write(file, items, is_lines: bool) -> None:
    file.write("" if is_lines else "[\n")
    for position, item in enumerate(items):
        comma = ",\n" if position and not is_lines else ""
        file.write(comma + json.dumps(item, ensure_ascii=False) + ("\n" if is_lines else ""))
    file.write("" if is_lines else "\n]\n")
