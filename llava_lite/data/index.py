"""Turn annotation files into Annotations: records by number, read from the files themselves through an index on disk.

The index is one folder a file, keyed by place, size and time of change, and holds byte spans, numbers of pictures,
token counts for each tokenizer and template, picture sizes for each image folder. It is made once, memory-mapped by
every process, and fills in only what it does not know yet: a record that is wrong is never remembered as such.
Letters: N records in use, M records of a file.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava_lite.data.cache import cache_root, file_key, key_of, load_array, locked, save_array
from llava_lite.data.records import READERS, Record, Source, open_sources, sample_positions
from llava_lite.data.scan import DataError, placed_error

# Raised when what is stored, or how it is counted, changes.
VERSION = 1
CHUNK_RECORDS = 512


class IndexedFile:
    """One annotation file with its index; records by position in the file. Pickles to two paths."""

    def __init__(self, source: Source, folder: Path):
        self.source = source
        self.folder = folder
        self._open()

    def _open(self):
        self.reader = READERS[self.source.kind]
        self.spans = load_array(self.folder / "spans.npy")  # [M, 2]
        self.file = open(self.source.path, "rb")  # noqa: SIM115 - open as long as this object lives

    def __getstate__(self):
        """Travel to a worker as two paths; the arrays are mapped again there."""
        return {"source": self.source, "folder": self.folder}

    def __setstate__(self, state):
        """Open what the paths lead to."""
        self.__dict__.update(state)
        self._open()

    def __len__(self):
        return len(self.spans)

    def where(self, position: int) -> str:
        """Return the words for a place: `train.json[17]`."""
        return f"{os.path.basename(self.source.path)}[{position}]"

    def __getitem__(self, position: int) -> Record:
        """Return a record; DataError with file, line and reason if it is none."""
        start, stop = self.spans[position].tolist()
        # pread leaves the file's position alone, which forked workers share.
        data = os.pread(self.file.fileno(), stop - start, start)
        try:
            return self.reader.parse(data, self.where(position), self.source.image_folder)
        except DataError:
            raise
        except ValueError as error:
            raise placed_error(self.source.path, start, data, error) from None
        except RecursionError:
            raise DataError(f"{self.where(position)} is nested too deeply to be a record.") from None


def index_file(source: Source, root: Path) -> IndexedFile:
    """Return the file with its spans, found now if they are not in the cache."""
    folder = root / f"{Path(source.path).stem[:40]}-{key_of(VERSION, source.kind, file_key(source.path))}"
    if not (folder / "spans.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "spans", f"index {source.path}"):
            if not (folder / "spans.npy").exists():
                spans = READERS[source.kind].scan(source.path)
                save_array(folder / "spans.npy", spans)
    indexed = IndexedFile(source, folder)
    if not len(indexed):
        raise DataError(f"{source.path} holds no record.")
    return indexed


class Measured(NamedTuple):
    """What a measure said about some records: a row of numbers each, or the reason why it cannot."""

    positions: list[int]
    rows: list[tuple[int, ...]]
    problems: list[tuple[int, DataError | ValueError]]


def _measure_chunk(file: IndexedFile, positions: list[int], measure: Callable) -> Measured:
    measured = Measured([], [], [])
    for position in positions:
        try:
            row = measure(file[position])
        except ValueError as error:
            measured.problems.append((position, error))
        else:
            measured.positions.append(position)
            measured.rows.append(row)
    return measured


def measure_records(
    file: IndexedFile,
    positions: np.ndarray,
    measure: Callable[[Record], tuple[int, ...]],
    purpose: str,
    num_workers: int = 0,
    num_threads: int = 0,
) -> Iterator[Measured]:
    """Yield what `measure` says about the records at `positions` [n], in order and in pieces, with a progress bar.

    num_workers: processes, for work of the processor; `measure` must pickle. num_threads: for waiting on a disk.
    A ValueError of `measure` is the record's problem, not the run's.
    """
    from tqdm import tqdm

    pieces = [positions[i : i + CHUNK_RECORDS].tolist() for i in range(0, len(positions), CHUNK_RECORDS)]
    with tqdm(total=len(positions), desc=purpose, unit="record", disable=len(pieces) < 2) as bar:
        for measured in _run(file, pieces, measure, num_workers, num_threads):
            bar.update(len(measured.positions) + len(measured.problems))
            yield measured


def _run(file, pieces, measure, num_workers, num_threads) -> Iterator[Measured]:
    pool: Executor | None = None
    if len(pieces) > 1 and num_workers > 0:
        # Not forked: the parent may hold threads of the tokenizer, of torch or of a device.
        pool = ProcessPoolExecutor(min(num_workers, len(pieces)), mp_context=get_context("spawn"))
    elif len(pieces) > 1 and num_threads > 0:
        pool = ThreadPoolExecutor(min(num_threads, len(pieces)))
    if pool is None:
        yield from (_measure_chunk(file, piece, measure) for piece in pieces)
        return
    with pool:
        # A window of tasks, so that a million rows never wait at once.
        waiting = []
        for piece in pieces:
            waiting.append(pool.submit(_measure_chunk, file, piece, measure))
            if len(waiting) > 4 * max(num_workers, num_threads):
                yield waiting.pop(0).result()
        yield from (task.result() for task in waiting)


class Facts:
    """A table [M, C] of one file in its index, one row a record, -1 where nothing is known yet."""

    def __init__(self, file: IndexedFile, name: str, num_columns: int):
        self.file = file
        self.path = file.folder / f"{name}.npy"
        self.num_columns = num_columns

    def rows(self) -> np.ndarray:
        """Return the table [M, C], memory-mapped if it exists."""
        rows = load_array(self.path)
        if rows is None or rows.shape != (len(self.file), self.num_columns):
            return np.full((len(self.file), self.num_columns), -1, np.int32)
        return rows

    def complete(self, positions: np.ndarray, measure, purpose, **pool) -> list[tuple[int, ValueError]]:
        """Fill in what is unknown at `positions` [n]; return (position, reason) of the records that cannot be measured.

        Those stay unknown, so that a mended record is seen at the next start.
        """
        if self._known(positions):
            return []
        with locked(self.path, purpose):
            rows = np.array(self.rows())
            unknown = positions[rows[positions, 0] < 0]
            problems = []
            for measured in measure_records(self.file, unknown, measure, purpose, **pool):
                problems += measured.problems
                if measured.rows:
                    rows[measured.positions] = measured.rows
            if len(problems) < len(unknown):
                save_array(self.path, rows)
        return problems

    def _known(self, positions) -> bool:
        return bool((self.rows()[positions, 0] >= 0).all())


def _num_pictures(record: Record) -> tuple[int]:
    return (len(record.images),)


class Annotations:
    """Records of one file or many, by number; nothing of them is held in memory. Pickles to a few paths.

    files: the files in order; selection: numbers [N] of the records in use, counted over all files, or None for all.
    """

    def __init__(self, files: Sequence[IndexedFile], selection: np.ndarray | None, root: Path):
        self.files = list(files)
        self.root = root
        self.selection_path = None if selection is None else self._keep(np.asarray(selection, np.int64))
        self._open()

    def _keep(self, selection: np.ndarray) -> Path:
        path = self.root / "selections" / f"{key_of(selection.tobytes())}.npy"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            save_array(path, selection)
        return path

    def _open(self):
        # starts[k] is the number of the first record of file k, over all files.
        self.starts = np.cumsum([0] + [len(file) for file in self.files])
        self.selection = None if self.selection_path is None else load_array(self.selection_path)

    def __getstate__(self):
        """Travel to a worker as paths."""
        return {"files": self.files, "root": self.root, "selection_path": self.selection_path}

    def __setstate__(self, state):
        """Map the files again."""
        self.__dict__.update(state)
        self._open()

    def __len__(self):
        return int(self.starts[-1]) if self.selection is None else len(self.selection)

    def place(self, i: int) -> tuple[IndexedFile, int]:
        """Return the file and the position in it of record i."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}.")
        i = i % len(self)
        number = i if self.selection is None else int(self.selection[i])
        k = 0 if len(self.files) == 1 else int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.files[k], number - int(self.starts[k])

    def __getitem__(self, i: int) -> Record:
        """Return record i; DataError if it cannot be read."""
        file, position = self.place(i)
        return file[position]

    def select(self, chosen: np.ndarray) -> "Annotations":
        """Return the annotations with the records `chosen` [n] of these alone: a split, or what a check left over."""
        chosen = np.asarray(chosen)
        return Annotations(self.files, chosen if self.selection is None else self.selection[chosen], self.root)

    def positions(self) -> Iterator[tuple[IndexedFile, np.ndarray, np.ndarray]]:
        """Yield each file with the positions [n] in it that are in use, and their numbers [n] here."""
        numbers = np.arange(len(self)) if self.selection is None else np.asarray(self.selection)
        for k, file in enumerate(self.files):
            here = np.flatnonzero((numbers >= self.starts[k]) & (numbers < self.starts[k + 1]))
            yield file, numbers[here] - self.starts[k], here

    def complete(self, name: str, num_columns: int, measure, purpose: str, **pool) -> dict[int, ValueError]:
        """Make sure that the table `name` knows every record in use; return the reason for each that it cannot know."""
        problems = {}
        for file, positions, numbers in self.positions():
            found = Facts(file, name, num_columns).complete(np.unique(positions), measure, purpose, **pool)
            reasons = dict(found)
            for number, position in zip(numbers.tolist(), positions.tolist(), strict=True):
                if position in reasons:
                    problems[number] = reasons[position]
        return problems

    def facts(self, name: str, num_columns: int) -> np.ndarray:
        """Return the rows [N, C] of the table `name` for the records in use; -1 where unknown."""
        rows = np.empty((len(self), num_columns), np.int32)
        for file, positions, numbers in self.positions():
            rows[numbers] = Facts(file, name, num_columns).rows()[positions]
        return rows
