"""Turn an annotation file into records by position, read from the file itself through an index on disk.

Letters: M records of the file, N of any.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava_lite.data.cache import file_key, key_of, load_array, locked, save_array
from llava_lite.data.facts import Facts
from llava_lite.data.foreign_files import foreign_file_error, refuse_foreign_file
from llava_lite.data.record_formats import ForeignRecord
from llava_lite.data.records import Record, num_empty_answers, num_missing_images
from llava_lite.data.scan import DataError, placed_error
from llava_lite.data.sources import READERS, Source

# Raised when what is stored, or how it is counted, changes.
VERSION = 3


class IndexedFile:
    """One annotation file with its index; records by position in the file. Pickles to two paths."""

    def __init__(self, source: Source, folder: Path):
        self.source = source
        self.folder = folder
        self._open()

    def _open(self):
        self.reader = READERS[self.source.kind]
        self.name = os.path.basename(self.source.path)
        self.spans = load_array(self.folder / "spans.npy")  # [M, 2]
        self.file = open(self.source.path, "rb")  # noqa: SIM115 - open as long as this object lives

    def __reduce__(self):
        """Travel to a worker as two paths; the arrays are mapped again there."""
        return type(self), (self.source, self.folder)

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, position: int) -> Record:
        """Return a record; DataError with file, line and reason if it is none."""
        start, stop = self.spans[position].tolist()
        where = f"{self.name}[{position}]"
        try:
            # pread leaves the file's position alone, which forked workers share.
            data = os.pread(self.file.fileno(), stop - start, start)
        except OSError as error:
            raise DataError(f"{where}: {self.source.path} cannot be read ({error.strerror}).") from error
        try:
            return self.reader.parse(data, where, self.source.image_folder)
        except DataError:
            raise
        except ValueError as error:
            raise placed_error(self.source.path, start, data, error) from None
        except RecursionError:
            raise DataError(f"{where} is nested too deeply to be a record.") from None

    def table(self, name: str, num_columns: int, per_picture: bool = False) -> Facts:
        """Return a table with a slot for each record, or for each picture in the image folder of this file."""
        starts = np.arange(len(self) + 1)
        if per_picture:
            name += "-" + key_of(os.path.realpath(self.source.image_folder or ""))
            starts = np.concatenate([[0], np.cumsum(np.maximum(self.num_pictures(), 0))])
        return Facts(self.folder / f"{name}.npy", num_columns, starts)

    def num_pictures(self) -> np.ndarray:
        """Return the number of pictures of each record, [M]; -1 for what is no record."""
        return self.table("records", len(RecordFacts._fields)).rows()[:, 0]


class RecordFacts(NamedTuple):
    """What is kept of each record's shape: a table's columns [N], or one row of them."""

    num_images: np.ndarray | int
    num_missing: np.ndarray | int  # image placeholders of a record that has no image
    num_turns: np.ndarray | int  # of both sides
    num_empty: np.ndarray | int  # answers that are supervised and hold no text


def _measure(record: Record) -> RecordFacts:
    num_missing = 0 if record.images else num_missing_images(record)
    return RecordFacts(len(record.images), num_missing, len(record.turns), num_empty_answers(record))


def index_file(source: Source, root: Path, num_workers: int = 0) -> IndexedFile:
    """Return the file with its spans and numbers of pictures, found now if they are not in the cache."""
    folder = root / f"{Path(source.path).stem[:40]}-{key_of(VERSION, source.kind, file_key(source.path))}"
    if not (folder / "spans.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "spans", f"index {source.path}"):
            if not (folder / "spans.npy").exists():
                save_array(folder / "spans.npy", _scan(source))
    indexed = IndexedFile(source, folder)
    if not len(indexed):
        raise DataError(f"{source.path} holds no record.")
    _refuse_foreign(indexed)
    # Of the whole file, whatever part is in use: tables of pictures are laid out by these numbers.
    everywhere = np.arange(len(indexed))
    table = indexed.table("records", len(RecordFacts._fields))
    table.complete(indexed, everywhere, _measure, f"reading {indexed.name}", num_workers=num_workers)
    return indexed


def _scan(source: Source) -> np.ndarray:
    try:
        return READERS[source.kind].scan(source.path)
    except DataError as error:
        refuse_foreign_file(source.path)
        raise error


def _refuse_foreign(file: IndexedFile) -> None:
    """Raise DataError with the command that converts a file, if its first record is of a format that is not read."""
    try:
        file[0]
    except ForeignRecord as error:
        raise foreign_file_error(file.source.path, error) from None
    except DataError:
        # One record may be broken: they are all looked at later.
        return
