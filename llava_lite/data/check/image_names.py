"""Keep the names of a file's images beside its index, so that a look at the files reads and parses no record.

M records of the file.
"""

from itertools import chain
from typing import NamedTuple

import numpy as np

from llava_lite.data.index.cache import load_array, load_undamaged, locked, save_array
from llava_lite.data.index.indexed_file import IndexedFile
from llava_lite.data.index.tables import measure_records


class NamedImages(NamedTuple):
    """What a StampMeter must know of a record: its image folder and the names of its images."""

    image_folder: str | None
    images: list[str]


class NamedFile:
    """Stands for an IndexedFile where only images matter: the names by position, or the record where it has others.

    names: UTF-8 [bytes], those of a record joined by NUL; starts: [M + 1], where each record begins in it.
    """

    def __init__(self, file: IndexedFile, names: np.ndarray, starts: np.ndarray):
        self.file, self.names, self.starts = file, names, starts

    def __getitem__(self, position: int):
        """Return the names, or a record that also has images of another kind."""
        data = self.names[self.starts[position] : self.starts[position + 1]].tobytes()
        if not data:
            return self.file[position]
        return NamedImages(self.file.source.image_folder, data.decode("utf-8", "surrogatepass").split("\0"))


def _get_names(record) -> bytes:
    """Return the names of a record as bytes, b"" if one of its images is no plain file."""
    names = record.images
    if not all(isinstance(name, str) and name and "\0" not in name for name in names):
        return b""
    return "\0".join(names).encode("utf-8", "surrogatepass")


def open_names(file: IndexedFile, num_threads: int = 0) -> NamedFile:
    """Return the names of a file's images, read from all its records the first time, and where they are damaged."""
    path = file.table("image-names", 1).path
    paths = path, path.with_name(f"{path.stem}-starts.npy")
    names, starts = map(load_undamaged, paths)
    if names is None or starts is None:
        with locked(path, f"read the image names of {file.name}"):
            names, starts = map(load_undamaged, paths)
            if names is None or starts is None:
                _write(file, *paths, num_threads)
                names, starts = map(load_array, paths)
    return NamedFile(file, names, starts)


def _write(file: IndexedFile, path, starts_path, num_threads: int) -> None:
    lengths, parts = np.zeros(len(file), np.int64), []
    positions = np.flatnonzero(file.num_images() > 0)
    purpose = f"reading image names of {file.name}"
    for measured in measure_records(file, positions, _get_names, purpose, num_threads=num_threads):
        lengths[measured.positions] = [len(row) for row in measured.rows]
        parts.append(measured.rows)
    # One byte more, since an empty array cannot be mapped.
    save_array(path, np.frombuffer(b"".join([*chain.from_iterable(parts), b"\0"]), np.uint8))
    save_array(starts_path, np.concatenate([[0], np.cumsum(lengths)]))
