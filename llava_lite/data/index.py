"""Turn annotation files into Annotations: records by number, read from the files themselves through an index on disk.

The index is one folder a file, keyed by the file's place, size and time of change. It holds byte spans, numbers of
pictures, token counts for each tokenizer and template, picture sizes for each image folder; it is made once, and every
process maps it into memory. Letters: N records in use, M records of a file, S pictures.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava_lite.anyres import PictureLayout
from llava_lite.data.cache import cache_root, file_key, key_of, load_array, locked, save_array
from llava_lite.data.facts import Facts, slots_of
from llava_lite.data.records import READERS, Record, Source, open_sources, sample_positions
from llava_lite.data.scan import DataError, placed_error

# Raised when what is stored, or how it is counted, changes.
VERSION = 1


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
        # pread leaves the file's position alone, which forked workers share.
        data = os.pread(self.file.fileno(), stop - start, start)
        where = f"{self.name}[{position}]"
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
        return self.table("records", 1).rows()[:, 0]


def _count_pictures(record: Record) -> tuple[int]:
    return (len(record.images),)


def index_file(source: Source, root: Path, num_workers: int = 0) -> IndexedFile:
    """Return the file with its spans and numbers of pictures, found now if they are not in the cache."""
    folder = root / f"{Path(source.path).stem[:40]}-{key_of(VERSION, source.kind, file_key(source.path))}"
    if not (folder / "spans.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "spans", f"index {source.path}"):
            if not (folder / "spans.npy").exists():
                save_array(folder / "spans.npy", READERS[source.kind].scan(source.path))
    indexed = IndexedFile(source, folder)
    if not len(indexed):
        raise DataError(f"{source.path} holds no record.")
    # Of the whole file, whatever part is in use: tables of pictures are laid out by these numbers.
    everywhere = np.arange(len(indexed))
    table = indexed.table("records", 1)
    table.complete(indexed, everywhere, _count_pictures, f"reading {indexed.name}", num_workers=num_workers)
    return indexed


class TokenFacts(NamedTuple):
    """What is kept of each record's tokens, one placeholder a picture: a table's columns [N], or one row of them."""

    text_len: np.ndarray | int
    num_learned: np.ndarray | int
    first_learned: np.ndarray | int  # position of the first learned token, or text_len
    pictures_before: np.ndarray | int  # pictures in front of it
    last_picture: np.ndarray | int  # position of the last picture, or -1
    num_empty: np.ndarray | int  # answers without a word
    num_special: np.ndarray | int  # special tokens that are spelled in its texts
    is_reasoned: np.ndarray | int  # 1 if its last answer has reasoning in front, ended by </think>


class Tables(NamedTuple):
    """Which tables of the index hold token counts and picture sizes, and how a picture becomes features."""

    tokens: str | None = None
    layout: PictureLayout = PictureLayout(1)
    pictures: str | None = None


class Annotations:
    """Records of one file or many, by number; nothing of them is held in memory. Pickles to a few paths.

    files: the files in order. selection: numbers [N] of the records in use, counted over all files; None for all.
    tables: what count_tokens and check_annotations have filled in.
    """

    def __init__(
        self,
        files: Sequence[IndexedFile],
        selection: np.ndarray | Path | None,
        root: Path,
        tables: Tables = Tables(),  # noqa: B008 - a tuple does not change
    ):
        self.files = list(files)
        self.root = root
        self.tables = tables
        self.selection_path = _kept(selection, root) if isinstance(selection, np.ndarray) else selection
        self.selection = None if self.selection_path is None else load_array(self.selection_path)
        # starts[k] is the number of the first record of file k, over all files.
        self.starts = np.cumsum([0] + [len(file) for file in self.files]).tolist()

    def __reduce__(self):
        """Travel to a worker as paths."""
        return type(self), (self.files, self.selection_path, self.root, self.tables)

    def __len__(self):
        return self.starts[-1] if self.selection is None else len(self.selection)

    def place(self, i: int) -> tuple[IndexedFile, int]:
        """Return the file and the position in it of record i."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}.")
        number = i % len(self) if self.selection is None else int(self.selection[i])
        k = bisect_right(self.starts, number) - 1
        return self.files[k], number - self.starts[k]

    def __getitem__(self, i: int) -> Record:
        """Return record i; DataError if it cannot be read."""
        file, position = self.place(i)
        return file[position]

    def select(self, chosen: np.ndarray) -> "Annotations":
        """Return these annotations with the records `chosen` [n] alone: a split, or what a check left over."""
        chosen = np.asarray(chosen, np.int64)
        if self.selection is not None:
            chosen = self.selection[chosen]
        return Annotations(self.files, chosen, self.root, self.tables)

    def by_file(self) -> Iterator[tuple[IndexedFile, np.ndarray, np.ndarray]]:
        """Yield each file with the positions [n] in it that are in use, and their numbers [n] here."""
        if self.selection is None:
            for k, file in enumerate(self.files):
                yield file, np.arange(len(file)), np.arange(self.starts[k], self.starts[k + 1])
            return
        for k, file in enumerate(self.files):
            here = np.flatnonzero((self.selection >= self.starts[k]) & (self.selection < self.starts[k + 1]))
            yield file, self.selection[here] - self.starts[k], here

    def complete(self, name, num_columns, measure, purpose, per_picture=False, **pool) -> dict[int, ValueError]:
        """Make sure that the table `name` knows every record in use; return the reason for each it cannot know.

        measure: Record -> its numbers. pool: num_workers, num_threads.
        """
        problems = {}
        for file, positions, numbers in self.by_file():
            table = file.table(name, num_columns, per_picture)
            reasons = table.complete(file, np.unique(positions), measure, f"{purpose} of {file.name}", **pool)
            for i in np.flatnonzero(np.isin(positions, list(reasons))) if reasons else ():
                problems[int(numbers[i])] = reasons[int(positions[i])]
        return problems

    def facts(self, name: str, num_columns: int) -> np.ndarray:
        """Return the rows [N, C] of the table `name`, one a record in use; -1 where unknown."""
        rows = np.empty((len(self), num_columns), np.int32)
        for file, positions, numbers in self.by_file():
            rows[numbers] = file.table(name, num_columns).rows()[positions]
        return rows

    @property
    def num_pictures(self) -> np.ndarray:
        """Number of pictures of each record, [N]; 0 for what is no record."""
        return np.maximum(self.facts("records", 1)[:, 0], 0)

    @property
    def has_picture(self) -> np.ndarray:
        """Which records have pictures, [N] bool."""
        return self.num_pictures > 0

    def count_tokens(self, encoder, layout: PictureLayout, num_workers: int = 0) -> dict[int, ValueError]:
        """Count the tokens of every record, if they are not yet counted; return the reason for each that has none.

        encoder: a RecordEncoder; layout: how a picture becomes features; num_workers: processes.
        """
        name = f"tokens-{encoder.fingerprint}"
        self.tables = self.tables._replace(tokens=name, layout=layout)
        columns = len(TokenFacts._fields)
        return self.complete(name, columns, encoder.measure, "counting tokens", num_workers=num_workers)

    def token_facts(self) -> TokenFacts:
        """Return the columns [N] that count_tokens has filled in, -1 where a record could not be counted."""
        if self.tables.tokens is None:
            raise RuntimeError("tokens are known after count_tokens(encoder, layout).")
        return TokenFacts(*self.facts(self.tables.tokens, len(TokenFacts._fields)).T)

    @property
    def token_lengths(self) -> np.ndarray:
        """Tokens of each record with every feature of its pictures, not truncated, [N]; 0 for what is no record."""
        text_len = self.token_facts().text_len
        return np.where(text_len < 0, 0, text_len + self.picture_tokens() - self.num_pictures)

    @property
    def learned_share(self) -> float:
        """Share of their tokens, not truncated, that carry a label, 0 to 1."""
        learned = np.maximum(self.token_facts().num_learned, 0).sum(dtype=np.int64)
        return float(learned / max(1, self.token_lengths.sum(dtype=np.int64)))

    def picture_tokens(self, num_first: np.ndarray | None = None) -> np.ndarray:
        """Return the features [N] of each record's pictures, or of the `num_first` [N] of them alone.

        Under any-resolution they are known once the pictures are; one that could not be measured counts for none.
        """
        num_pictures = self.num_pictures
        counted = num_pictures if num_first is None else np.clip(num_first, 0, num_pictures)
        layout = self.tables.layout
        if not layout.is_anyres:
            return counted * layout.num_features
        sizes, kinds = np.unique(self.picture_sizes, axis=0, return_inverse=True)
        tokens = np.array([layout.num_tokens(size) if min(size) > 0 else 0 for size in sizes.tolist()], np.int64)
        sums = np.concatenate([[0], np.cumsum(tokens[kinds.reshape(-1)])])  # [S + 1]
        starts = np.cumsum(num_pictures) - num_pictures
        return sums[starts + counted] - sums[starts]

    @property
    def picture_sizes(self) -> np.ndarray:
        """Width and height [S, 2] of all pictures, record after record (num_pictures tells them apart)."""
        if self.tables.pictures is None:
            raise RuntimeError("picture sizes are known after check_annotations.")
        starts = np.concatenate([[0], np.cumsum(self.num_pictures)])
        sizes = np.empty((int(starts[-1]), 2), np.int32)
        for file, positions, numbers in self.by_file():
            table = file.table(self.tables.pictures, 3, per_picture=True)
            sizes[slots_of(starts, numbers)] = table.rows()[slots_of(table.starts, positions), :2]
        return sizes


def _kept(selection: np.ndarray, root: Path) -> Path:
    """Return where the selection lies on disk, so that a worker needs only the path."""
    path = root / "selections" / f"{key_of(selection.tobytes())}.npy"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        save_array(path, selection)
    return path


def open_annotations(
    data_path: str | Sequence[str],
    image_folder: str | None = None,
    cache_dir: str | None = None,
    num_workers: int = 0,
    seed: int = 0,
) -> Annotations:
    """Return the records of JSON files, JSON-lines files and YAML mixtures, indexed now if they never were.

    image_folder: where picture paths start, unless a mixture says otherwise. cache_dir: see cache_root.
    num_workers: processes that read a new file. seed: of `random:N` samples, the same on every rank.
    Raises DataError with file, line and reason for what is no list of records; a single wrong record is found by
    check_annotations, or when it is read.
    """
    root = cache_root(cache_dir)
    sources = open_sources(data_path, image_folder)
    files = [index_file(source, root, num_workers) for source in sources]
    selection = None
    if any(source.sampling != "all" for source in sources):
        start, samples = 0, []
        for k, (source, file) in enumerate(zip(sources, files, strict=True)):
            samples.append(start + sample_positions(source.sampling, len(file), seed + k))
            start += len(file)
        selection = np.concatenate(samples)
    return Annotations(files, selection, root)
