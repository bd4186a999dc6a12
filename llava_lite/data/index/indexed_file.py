"""Read records of an annotation file by position, from the file itself through an index on disk.

Letters: M records of the file, N of any.
"""

import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava_lite.data.errors import DataError
from llava_lite.data.index.cache import (
    file_key,
    get_key,
    load_array,
    load_undamaged,
    locked,
    make_directory,
    save_array,
)
from llava_lite.data.index.scan import placed_error
from llava_lite.data.index.sources import READERS, Source
from llava_lite.data.index.tables import Facts
from llava_lite.data.records.foreign_files import check_no_foreign_file, foreign_file_error
from llava_lite.data.records.formats import ForeignRecord
from llava_lite.data.records.media import kind_bits
from llava_lite.data.records.recipes import apply_recipe
from llava_lite.data.records.record import Record, num_empty_answers, num_missing_images, parse_record

# Increased when the stored facts, or how they are counted, change.
VERSION = 6


class IndexedFile:
    """One annotation file with its index; records by position in the file. Pickles to two paths."""

    def __init__(self, source: Source, directory: Path):
        self.source = source
        self.directory = directory
        self._open()

    def _open(self):
        self.reader = READERS[self.source.kind]
        self.head = self.reader.head(self.source.path)
        self.name = os.path.basename(self.source.path)
        self.spans = load_array(self.directory / "spans.npy")  # [M, 2]
        self.file = open(self.source.path, "rb")  # noqa: SIM115 - open as long as this object lives

    def __reduce__(self):
        """Pickle as two paths; a worker maps the arrays again."""
        return type(self), (self.source, self.directory)

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, position: int) -> Record:
        """Return a record; DataError with file, line and reason if it cannot be read."""
        start, stop = self.spans[position].tolist()
        where = f"{self.name}[{position}]"
        try:
            # pread does not change the file's position, which forked workers share.
            data = os.pread(self.file.fileno(), stop - start, start)
        except OSError as error:
            raise DataError(f"{where}: {self.source.path} cannot be read ({error.strerror}).") from error
        try:
            item = apply_recipe(self.reader.load(data, self.head), self.source.recipe, where)
            record = parse_record(item, where, self.source.image_folder)
            return record if self.source.template is None else record._replace(template=self.source.template)
        except DataError:
            raise
        except ValueError as error:
            raise placed_error(self.source.path, start, data, error) from None
        except RecursionError:
            raise DataError(f"{where} is nested too deeply to be a record.") from None

    def table(self, name: str, num_columns: int, per_image: bool = False) -> Facts:
        """Return a table with a slot for each record, or for each image in the image folder of this file.

        A file that is read twice, by two templates or recipes, has tables of its own for each.
        """
        if self.source.template is not None or self.source.recipe is not None:
            name += "-" + get_key(self.source.template, self.source.recipe)
        starts = np.arange(len(self) + 1)
        if per_image:
            name += "-" + get_key(os.path.realpath(self.source.image_folder or ""))
            starts = np.concatenate([[0], np.cumsum(np.maximum(self.num_images(), 0))])
        return Facts(self.directory / f"{name}.npy", num_columns, starts)

    def num_images(self) -> np.ndarray:
        """Return the number of images of each record, [M]; -1 for one that cannot be read."""
        return self.table("records", len(RecordFacts._fields)).rows()[:, 0]


class RecordFacts(NamedTuple):
    """Facts about a record: the columns [N] of a table, or one row."""

    num_images: np.ndarray | int
    num_missing: np.ndarray | int  # image placeholders of a record that has no image
    num_turns: np.ndarray | int  # of both sides
    num_empty: np.ndarray | int  # supervised answers without text
    media: np.ndarray | int  # kinds of media that together are its image, as kind_bits returns them
    checksum: np.ndarray | int  # 31 bits of a CRC-32 of its texts and of the names of its images


def _measure(record: Record) -> RecordFacts:
    num_missing = 0 if record.images else num_missing_images(record)
    num_images, num_turns = len(record.images), len(record.turns)
    empty, kinds = num_empty_answers(record), kind_bits(record.images)
    return RecordFacts(num_images, num_missing, num_turns, empty, kinds, get_content_checksum(record))


def get_content_checksum(record: Record) -> int:
    """Return a checksum of what a record says, 31 bits: of its turns, system text and images, bytes or names.

    Two spellings of the same record have the same one, and so has a file of records that was moved.
    """
    images = [zlib.crc32(image) if isinstance(image, bytes) else image for image in record.images]
    content = repr((record.system, record.turns, sorted(record.not_supervised), images))
    # For a table of int32 in which -1 is unknown.
    return zlib.crc32(content.encode("utf-8", "surrogatepass")) >> 1


def index_file(source: Source, root: Path, num_workers: int = 0) -> IndexedFile:
    """Return the file with its index, which is made now if it is not in the cache."""
    directory = root / f"{Path(source.path).stem[:40]}-{get_key(VERSION, source.kind, file_key(source.path))}"
    if load_undamaged(directory / "spans.npy") is None:
        make_directory(directory)
        with locked(directory / "spans", f"index {source.path}"):
            if load_undamaged(directory / "spans.npy") is None:
                save_array(directory / "spans.npy", _scan(source))
    indexed = IndexedFile(source, directory)
    if not len(indexed):
        raise DataError(f"{source.path} holds no record.")
    _check_not_foreign(indexed)
    # Of all records, also those not in use: the layout of tables of images depends on these numbers.
    everywhere = np.arange(len(indexed))
    table = indexed.table("records", len(RecordFacts._fields))
    table.complete(indexed, everywhere, _measure, f"reading {indexed.name}", num_workers=num_workers)
    return indexed


def _scan(source: Source) -> np.ndarray:
    try:
        return READERS[source.kind].scan(source.path)
    except DataError as error:
        check_no_foreign_file(source.path)
        raise error


def _check_not_foreign(file: IndexedFile) -> None:
    """Raise DataError with the command that converts a file, if its first record is of a format that is not read."""
    try:
        file[0]
    except ForeignRecord as error:
        raise foreign_file_error(file.source.path, error) from None
    except DataError:
        # One record may be wrong: all are checked later.
        return
