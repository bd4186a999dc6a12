"""Turn annotation files into Annotations: records by number, read from the files themselves through an index on disk.

The index is one folder a file, keyed by the file's place, size and time of change. It holds byte spans, numbers of
images and turns, token counts for each tokenizer and template, image sizes for each image folder; it is made once, and
every process maps it into memory. Letters: N records in use, M records of a file, S pictures.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava_lite.anyres import PictureLayout
from llava_lite.data.cache import cache_root, key_of, load_array, save_array
from llava_lite.data.facts import slots_of
from llava_lite.data.indexed_file import IndexedFile, RecordFacts, index_file
from llava_lite.data.records import Record
from llava_lite.data.sources import open_sources, sample_positions


class TokenFacts(NamedTuple):
    """What is kept of each record's tokens, one placeholder a picture: a table's columns [N], or one row of them."""

    text_len: np.ndarray | int
    num_learned: np.ndarray | int
    first_learned: np.ndarray | int  # position of the first learned token, or text_len
    pictures_before: np.ndarray | int  # pictures in front of it
    last_picture: np.ndarray | int  # position of the last picture, or -1
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

    def number(self, i: int) -> int:
        """Return the number of record i over all files, in use or not."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}.")
        return i % len(self) if self.selection is None else int(self.selection[i])

    def place(self, i: int) -> tuple[IndexedFile, int]:
        """Return the file and the position in it of record i."""
        number = self.number(i)
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

    def record_facts(self) -> RecordFacts:
        """Return the columns [N] of what is known of each record's shape, -1 for what is no record."""
        return RecordFacts(*self.facts("records", len(RecordFacts._fields)).T)

    @property
    def num_pictures(self) -> np.ndarray:
        """Number of pictures of each record, [N]; 0 for what is no record."""
        counts = np.empty(len(self), np.int32)
        for file, positions, numbers in self.by_file():
            counts[numbers] = file.num_pictures()[positions]
        return np.maximum(counts, 0)

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
