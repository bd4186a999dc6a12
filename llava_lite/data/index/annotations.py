"""Read records of annotation files by number, from the files themselves through an index on disk.

The index is one directory for each file, keyed by file_key. It holds byte spans, numbers of images and turns, token
counts for each tokenizer and template, and image sizes for each image folder. It is made once, and every process
memory-maps it. Letters: N records in use, M records of a file, S images.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava_lite.data.index.cache import cache_root, get_key, load_array, load_undamaged, make_directory, save_array
from llava_lite.data.index.indexed_file import IndexedFile, RecordFacts, index_file
from llava_lite.data.index.sources import open_sources, sample_positions
from llava_lite.data.index.tables import get_slots
from llava_lite.data.records.media import KINDS
from llava_lite.data.records.record import Record
from llava_lite.media.layout import ImageLayout

# Of the table of images: width, height, 1 for a file under another suffix than in the record, stamp of the file, its
# size in bytes (31 bits of it).
IMAGE_COLUMNS = 5


class TokenFacts(NamedTuple):
    """Facts about a record's tokens, with one placeholder an image: the columns [N] of a table, or one row."""

    text_len: np.ndarray | int
    num_supervised: np.ndarray | int
    first_supervised: np.ndarray | int  # position of the first supervised token, or text_len
    images_before: np.ndarray | int  # images before it
    last_image: np.ndarray | int  # position of the last image, or -1
    num_special: np.ndarray | int  # special tokens spelled in its texts
    is_reasoned: np.ndarray | int  # 1 if its last answer begins with reasoning, ended by </think>


class Tables(NamedTuple):
    """The names of the index tables with token counts and image sizes, and how an image becomes features."""

    tokens: str | None = None
    layout: ImageLayout = ImageLayout(1)
    images: str | None = None


class Annotations:
    """Records of one or more files, by number, not held in memory. Pickles to a few paths.

    files: in order. selection: numbers [N] of the records in use, counted over all files; None for all. tables: set by
    count_tokens and check_annotations.
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
        """Pickle as paths."""
        return type(self), (self.files, self.selection_path, self.root, self.tables)

    def __len__(self):
        return self.starts[-1] if self.selection is None else len(self.selection)

    def number(self, i: int) -> int:
        """Return the number of record i over all files, in use or not."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}.")
        return i % len(self) if self.selection is None else int(self.selection[i])

    def place(self, i: int) -> tuple[IndexedFile, int]:
        """Return the file of record i and its position there."""
        number = self.number(i)
        k = bisect_right(self.starts, number) - 1
        return self.files[k], number - self.starts[k]

    def __getitem__(self, i: int) -> Record:
        """Return record i; DataError if it cannot be read."""
        file, position = self.place(i)
        return file[position]

    def select(self, chosen: np.ndarray) -> "Annotations":
        """Return these annotations with only the records `chosen` [n]: a split, or the usable ones."""
        chosen = np.asarray(chosen, np.int64)
        if self.selection is not None:
            chosen = self.selection[chosen]
        return Annotations(self.files, chosen, self.root, self.tables)

    def by_file(self) -> Iterator[tuple[IndexedFile, np.ndarray, np.ndarray]]:
        """Yield each file, the positions [n] in use in it, and their numbers [n] here."""
        if self.selection is None:
            for k, file in enumerate(self.files):
                yield file, np.arange(len(file)), np.arange(self.starts[k], self.starts[k + 1])
            return
        for k, file in enumerate(self.files):
            here = np.flatnonzero((self.selection >= self.starts[k]) & (self.selection < self.starts[k + 1]))
            yield file, self.selection[here] - self.starts[k], here

    def complete(self, name, num_columns, measure, purpose, per_image=False, **pool) -> dict[int, ValueError]:
        """Fill the table `name` for every record in use; return the reason for each that cannot be measured.

        measure: Record -> its numbers. pool: num_workers, num_threads.
        """
        problems = {}
        for file, positions, numbers in self.by_file():
            table = file.table(name, num_columns, per_image)
            reasons = table.complete(file, np.unique(positions), measure, f"{purpose} of {file.name}", **pool)
            for i in np.flatnonzero(np.isin(positions, list(reasons))) if reasons else ():
                problems[int(numbers[i])] = reasons[int(positions[i])]
        return problems

    def facts(self, name: str, num_columns: int) -> np.ndarray:
        """Return the rows [N, C] of the table `name` for the records in use; -1 for unknown."""
        rows = np.empty((len(self), num_columns), np.int32)
        for file, positions, numbers in self.by_file():
            rows[numbers] = file.table(name, num_columns).rows()[positions]
        return rows

    def record_facts(self) -> RecordFacts:
        """Return the columns [N] of facts about each record, -1 for one that cannot be read."""
        return RecordFacts(*self.facts("records", len(RecordFacts._fields)).T)

    @property
    def num_images(self) -> np.ndarray:
        """Number of images of each record, [N]; 0 for one that cannot be read."""
        counts = np.empty(len(self), np.int32)
        for file, positions, numbers in self.by_file():
            counts[numbers] = file.num_images()[positions]
        return np.maximum(counts, 0)

    @property
    def groups(self) -> list[str]:
        """The group of each record, [N]: that of its file, else `image` or `text`."""
        groups, has_image = [""] * len(self), self.has_image
        for file, _, numbers in self.by_file():
            for i in numbers.tolist():
                groups[i] = file.source.group or ("image" if has_image[i] else "text")
        return groups

    @property
    def has_groups(self) -> bool:
        """Whether a file names the group of its records (the `type` of META)."""
        return any(file.source.group is not None for file in self.files)

    @property
    def has_image(self) -> np.ndarray:
        """Which records have images, [N] bool."""
        return self.num_images > 0

    def count_media(self) -> dict[str, int]:
        """Return how many records have each kind of media that together are an image, {} if none has."""
        bits = np.maximum(self.record_facts().media, 0)
        counts = {kind: int((bits >> k & 1).sum()) for k, kind in enumerate(KINDS)}
        return {kind: count for kind, count in counts.items() if count}

    def count_tokens(self, encoder, layout: ImageLayout, num_workers: int = 0) -> dict[int, ValueError]:
        """Count the tokens of every record that is not counted yet; return the reason for each that cannot be encoded.

        encoder: a RecordEncoder; layout: how an image becomes features; num_workers: processes.
        """
        name = f"tokens-{encoder.fingerprint}"
        self.tables = self.tables._replace(tokens=name, layout=layout)
        columns = len(TokenFacts._fields)
        return self.complete(name, columns, encoder.measure, "counting tokens", num_workers=num_workers)

    def token_facts(self) -> TokenFacts:
        """Return the columns [N] of count_tokens, -1 for a record that cannot be encoded."""
        if self.tables.tokens is None:
            raise RuntimeError("call count_tokens(encoder, layout) first.")
        return TokenFacts(*self.facts(self.tables.tokens, len(TokenFacts._fields)).T)

    @property
    def token_lengths(self) -> np.ndarray:
        """Tokens of each record with all image features, before truncation, [N]; 0 for one that cannot be read."""
        facts = self.token_facts()
        # Images have no place in the text where their features are added inside attention (adaption_prompt).
        more = np.where(facts.last_image < 0, 0, self.image_tokens() - self.num_images)
        return np.where(facts.text_len < 0, 0, facts.text_len + more)

    @property
    def supervised_fraction(self) -> float:
        """Fraction of all tokens, before truncation, that are supervised, 0 to 1."""
        num_supervised = np.maximum(self.token_facts().num_supervised, 0).sum(dtype=np.int64)
        return float(num_supervised / max(1, self.token_lengths.sum(dtype=np.int64)))

    def image_tokens(self, num_first: np.ndarray | None = None) -> np.ndarray:
        """Return the number of image features [N] of each record, or of its first `num_first` [N] images.

        For any-resolution the images must be measured; an image that cannot be measured counts as 0.
        """
        num_images = self.num_images
        counted = num_images if num_first is None else np.clip(num_first, 0, num_images)
        layout = self.tables.layout
        if not layout.is_anyres:
            return counted * layout.num_tokens()
        sizes, kinds = np.unique(self.image_sizes, axis=0, return_inverse=True)
        tokens = np.array([layout.num_tokens(size) if min(size) > 0 else 0 for size in sizes.tolist()], np.int64)
        sums = np.concatenate([[0], np.cumsum(tokens[kinds.reshape(-1)])])  # [S + 1]
        starts = np.cumsum(num_images) - num_images
        return sums[starts + counted] - sums[starts]

    @property
    def image_sizes(self) -> np.ndarray:
        """Width and height [S, 2] of all images, record after record (num_images of each)."""
        return self._image_facts()[:, :2]

    @property
    def image_bytes(self) -> np.ndarray:
        """Size in bytes [S] of the file of each image, record after record, -1 for unknown."""
        return self._image_facts()[:, -1]

    def _image_facts(self) -> np.ndarray:
        """Return the rows [S, C] of the table of images."""
        if self.tables.images is None:
            raise RuntimeError("call check_annotations first.")
        starts = np.concatenate([[0], np.cumsum(self.num_images)])
        rows = np.empty((int(starts[-1]), IMAGE_COLUMNS), np.int32)
        for file, positions, numbers in self.by_file():
            table = file.table(self.tables.images, IMAGE_COLUMNS, per_image=True)
            rows[get_slots(starts, numbers)] = table.rows()[get_slots(table.starts, positions)]
        return rows


def _kept(selection: np.ndarray, root: Path) -> Path:
    """Return the path of the selection on disk, so that a worker needs only the path."""
    path = root / "selections" / f"{get_key(selection.tobytes())}.npy"
    if load_undamaged(path) is None:
        make_directory(path.parent)
        save_array(path, selection)
    return path


def open_annotations(
    data_path: str | Sequence[str],
    image_folder: str | None = None,
    cache_dir: str | None = None,
    num_workers: int = 0,
    seed: int = 0,
) -> Annotations:
    """Return the records of JSON files, JSON-lines files and YAML mixtures; new files are indexed.

    image_folder: root of image paths, unless a mixture names another. cache_dir: see cache_root. num_workers:
    processes that read a new file. seed: of `random:N` samples, the same on every rank. Raises DataError with file,
    line and reason for a file that is not a list of records; check_annotations finds single records that are wrong.
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
