"""Cache the features of a frozen vision tower on disk, and read them memory-mapped.

There is one directory for each tower and image transform. It holds shards of two files: `<name>.bin`, the features,
and `<name>.npy`, the list of them. A shard has one writer. Its list is renamed into place last, and without it the
shard is not read, so a writer that is killed leaves no partial features. Any number of processes may write, each its
own shards, and read at the same time. The list has a CRC-32 of each image's features, which is compared whenever they
are read; damaged ones are taken off the list, so that the next run makes them again. Letters: S images of the records,
n crops of one, P features of a crop, C tower width.
"""

import logging
import os
import socket
import time
import uuid
import zlib
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from llava_lite.data.errors import DataError
from llava_lite.data.index.cache import (
    ADVICE,
    DamagedArray,
    get_key,
    load_array,
    load_undamaged,
    locked,
    make_directory,
    save_array,
)
from llava_lite.errors import named_disk_errors

logger = logging.getLogger(__name__)

# Increased when the stored data or their keys change.
VERSION = 3
SHARD_BYTES = 1 << 30
# Partial files that have not changed for this long belong to a writer that was killed.
ORPHAN_S = 24 * 3600
KEY = "S24"
# num_crops: 0 for an image that is one crop, [P, C] and not [n, P, C].
ENTRY = np.dtype(
    [
        ("key", KEY),
        ("offset", "<i8"),
        ("num_crops", "<i4"),
        ("num_features", "<i4"),
        ("size", "<i4", (2,)),
        ("checksum", "<u4"),
    ]
)
PLACE = np.dtype([("shard", "<i4"), *[(name, ENTRY[name]) for name in ENTRY.names[1:]]])


class DamagedFeatures(DataError):
    """Stored features whose bytes are not those that were written."""


class StoredImage(NamedTuple):
    """An image with cached features: (width, height), and features [P, C], or [n, P, C] of its crops."""

    size: tuple[int, int]
    features: torch.Tensor


class FeatureStore:
    """The directory of one tower and image transform: features by the key of an image's file.

    dtype: of the tower's output; nothing is rounded. width: C.
    """

    def __init__(self, directory: Path, dtype: torch.dtype, width: int):
        self.directory = Path(directory)
        self.dtype = dtype
        self.width = width

    def shards(self) -> list[str]:
        """Return the names of the complete shards."""
        return sorted(path.stem for path in self.directory.glob("*.npy") if path.with_suffix(".bin").exists())

    def find(self, keys: np.ndarray, names: list[str] | None = None) -> np.ndarray:
        """Return the place [S] of each key [S] (PLACE); `shard` is -1 if nothing is stored.

        names: of the shards that are searched; `shard` is an index into them. Default: those that are complete now.
        """
        places = np.zeros(len(keys), PLACE)
        places["shard"] = -1
        lists = [self._entries(name) for name in (self.shards() if names is None else names)]
        entries = np.concatenate([np.zeros(0, ENTRY), *lists])
        if len(entries):
            shards = np.repeat(np.arange(len(lists)), [len(one) for one in lists])
            order = np.argsort(entries["key"], kind="stable")
            at = order[np.searchsorted(entries["key"], keys, sorter=order).clip(max=len(order) - 1)]
            found = entries["key"][at] == keys
            places["shard"][found] = shards[at[found]]
            for field in ENTRY.names[1:]:
                places[field][found] = entries[field][at[found]]
        return places

    def _entries(self, name: str) -> np.ndarray:
        """Return the list of a shard as `_load` does, and remove a damaged one: what it named is made again."""
        path = self.directory / f"{name}.npy"
        entries = self._load(path)
        if entries is None:
            with suppress(OSError):
                self._remove_damaged(path)
            return np.zeros(0, ENTRY)
        return entries

    def _load(self, path: Path) -> np.ndarray | None:
        """Return a list without entries beyond the end of its file, which a crash may have lost.

        None for a damaged list, with a warning, and for none.
        """
        entries = load_undamaged(path)
        if entries is None or entries.dtype != ENTRY:
            return entries if entries is None else np.zeros(0, ENTRY)
        num_bytes = os.path.getsize(path.with_suffix(".bin"))
        return entries[entries["offset"] + self.num_bytes(entries) <= num_bytes]

    def _remove_damaged(self, path: Path) -> None:
        """Remove a list if it is damaged, and leave its features to `sweep`, as other processes may read them."""
        with locked(path, f"remove the damaged list {path}"):
            try:
                load_array(path)
            except DamagedArray:
                os.utime(path.with_suffix(".bin"))
                path.unlink()

    def _crop_bytes(self, num_features):
        return np.asarray(num_features, np.int64) * self.width * self.dtype.itemsize

    def drop_damaged(self, keys: np.ndarray) -> int:
        """Read the stored features of these images, take damaged ones off the lists, and return how many they were."""
        names, num_damaged = self.shards(), 0
        places = self.find(keys, names)
        for shard in np.unique(places["shard"][places["shard"] >= 0]).tolist():
            here = places[places["shard"] == shard]
            with open(self.directory / f"{names[shard]}.bin", "rb") as file:
                for place in here[np.argsort(here["offset"])]:
                    file.seek(int(place["offset"]))
                    if zlib.crc32(file.read(int(self.num_bytes(place)))) != place["checksum"]:
                        self.drop(names[shard], int(place["offset"]))
                        num_damaged += 1
        return num_damaged

    def drop(self, name: str, offset: int) -> None:
        """Take one entry off the list of a shard; processes that have read the list keep theirs."""
        path = self.directory / f"{name}.npy"
        with locked(path, f"take damaged features off {path}"):
            entries = self._load(path)
            if entries is not None:
                save_array(path, entries[entries["offset"] != offset])

    def num_bytes(self, places):
        """Return the bytes of the features at one or several places."""
        return np.maximum(places["num_crops"], 1) * self._crop_bytes(places["num_features"])

    def view(self, keys: np.ndarray, starts: np.ndarray) -> "FeatureView":
        """Return the features of images by record: record i has the images starts[i] to starts[i + 1] of keys [S].

        An empty key is an image that cannot be used: DataError when it is read. Raises KeyError if another image is
        not stored.
        """
        # Listed once: other processes add shards at any time, and an index must keep its meaning.
        names = self.shards()
        places = self.find(keys, names)
        missing = int(((places["shard"] < 0) & (keys != b"")).sum())
        if missing:
            raise KeyError(f"{missing} of {len(keys)} images have no features in {self.directory}.")
        path = self.directory / "views" / get_key(keys.tobytes(), starts.tobytes(), *names)
        make_directory(path.parent)
        for part, array in (("places", places), ("starts", starts)):
            save_array(path.with_suffix(f".{part}"), array)
        return FeatureView(self, names, path)

    def sweep(self) -> None:
        """Delete the partial files of writers that were killed."""
        for path in [*self.directory.glob("*.bin"), *self.directory.rglob("*.part")]:
            is_complete = path.suffix == ".bin" and path.with_suffix(".npy").exists()
            # Another rank may sweep at the same time, or a writer may just have finished.
            with suppress(FileNotFoundError):
                if not is_complete and time.time() - path.stat().st_mtime > ORPHAN_S:
                    path.unlink()


class FeatureView:
    """The cached features of a data set's images, by record, memory-mapped. Pickles to paths."""

    def __init__(self, store: FeatureStore, shards: list[str], path: Path):
        self.store = store
        self.shards = shards
        self.path = path
        self.places = load_array(path.with_suffix(".places"))
        self.starts = load_array(path.with_suffix(".starts"))
        self._map = lru_cache(maxsize=256)(self._open)

    def __reduce__(self):
        """Pickle as paths."""
        return type(self), (self.store, self.shards, self.path)

    def _open(self, shard: int) -> np.ndarray:
        return np.memmap(self.store.directory / f"{self.shards[shard]}.bin", np.uint8, mode="r")

    def __getitem__(self, i: int) -> list[StoredImage]:
        """Return the images of record i, in their order."""
        places = self.places[self.starts[i] : self.starts[i + 1]]
        if (places["shard"] < 0).any():
            raise DataError(f"record {i}: one of its images could not be used when the feature cache was filled.")
        return [self._read(i, place) for place in places]

    def _read(self, i: int, place) -> StoredImage:
        num_crops, num_features, start = int(place["num_crops"]), int(place["num_features"]), int(place["offset"])
        shape = (num_features, self.store.width)
        shape = (num_crops, *shape) if num_crops else shape
        # Copied: the memory map is read-only, and a batch is a copy anyway.
        data = np.array(self._map(int(place["shard"]))[start : start + int(self.store.num_bytes(place))])
        if zlib.crc32(data) != place["checksum"]:
            self._drop(i, self.shards[int(place["shard"])], start)
        features = torch.from_numpy(data).view(self.store.dtype).view(shape)
        return StoredImage(tuple(place["size"].tolist()), features)

    def _drop(self, i: int, shard: str, offset: int):
        """Take damaged features off the list, and raise DamagedFeatures for record i."""
        path = self.store.directory / f"{shard}.bin"
        advice = "Start again: they are made again, and the run resumes from its last checkpoint."
        try:
            self.store.drop(shard, offset)
        except OSError as error:
            advice = f"Delete {path.with_suffix('.npy')}, which could not be written ({error.strerror or error})."
        raise DamagedFeatures(
            f"record {i}: its cached features in {path} at byte {offset:,} are damaged (checksum differs). {advice}"
        )


class FeatureWriter:
    """Writes features into its own shards; after the `with` block they can all be read."""

    def __init__(self, store: FeatureStore):
        self.store = store
        self.file = None
        self.entries = []

    def __enter__(self):
        make_directory(self.store.directory)
        return self

    def __exit__(self, *error):
        # The features written so far are complete, whatever stopped the others.
        self.close_shard()

    def add(self, key: bytes, features: torch.Tensor, size: tuple[int, int]) -> None:
        """Write the features [P, C] of an image, or of its crops [n, P, C]; size: its width and height."""
        if features.dtype != self.store.dtype or features.shape[-1] != self.store.width:
            raise ValueError(
                f"features are {features.dtype} of width {features.shape[-1]}; this directory has {self.store.dtype} "
                f"of width {self.store.width}."
            )
        if self.file is None:
            name = f"{socket.gethostname()[:20]}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
            path = self.store.directory / f"{name}.bin"
            with named_disk_errors(path, ADVICE):
                self.file = open(path, "wb")  # noqa: SIM115 - closed in close_shard
        num_crops = len(features) if features.dim() == 3 else 0
        data, offset = features.detach().cpu().contiguous().view(torch.uint8).numpy().data, self.file.tell()
        with named_disk_errors(self.file.name, ADVICE, data.nbytes):
            self.file.write(data)
        self.entries.append((key, offset, num_crops, features.shape[-2], tuple(size), zlib.crc32(data)))
        if self.file.tell() >= SHARD_BYTES:
            self.close_shard()

    def close_shard(self) -> None:
        """Complete the shard, so that every process can read it."""
        if self.file is None:
            return
        path, file, entries = Path(self.file.name), self.file, self.entries
        self.file, self.entries = None, []
        try:
            with named_disk_errors(path, ADVICE, file.tell()):
                file.flush()
                os.fsync(file.fileno())
                file.close()
            save_array(path.with_suffix(".npy"), np.array(entries, ENTRY))
        except OSError:
            # The disk is full: a partial shard must not stay on it.
            with suppress(OSError):
                file.close()
            path.unlink(missing_ok=True)
            raise
