"""Keep what a frozen tower makes of pictures on disk, and read it back mapped into memory.

One folder a tower and way of preparing; in it shards of two files: `<name>.bin`, features one behind the other, and
`<name>.npy`, the list of them. A shard has one writer and is there once its list is, which is renamed into place last:
a writer that is killed leaves no half-written features that anyone could read. Any number of processes may write, each
its own shards, and read at the same time. Letters: S pictures of the records, n crops of one, P features of a crop,
C tower width.
"""

import os
import socket
import time
import uuid
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from llava_lite.data.cache import key_of, load_array, save_array
from llava_lite.data.scan import DataError

# Raised when what is stored, or how it is keyed, changes.
VERSION = 1
SHARD_BYTES = 1 << 30
# What a writer left behind that has been silent for so long is thrown away.
ORPHAN_S = 24 * 3600
KEY = "S24"
# num_crops: 0 for a picture that is one crop, [P, C] and not [n, P, C].
ENTRY = np.dtype(
    [("key", KEY), ("offset", "<i8"), ("num_crops", "<i4"), ("num_features", "<i4"), ("size", "<i4", (2,))]
)
PLACE = np.dtype([("shard", "<i4"), *[(name, ENTRY[name]) for name in ENTRY.names[1:]]])


class StoredPicture(NamedTuple):
    """A picture of which the features are known: (width, height), and [P, C] or, of its crops, [n, P, C]."""

    size: tuple[int, int]
    features: torch.Tensor


class FeatureStore:
    """The folder of one tower and one way of preparing: features by the key of a picture's file.

    dtype: what the tower puts out; nothing is rounded. width: C.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, width: int):
        self.folder = Path(folder)
        self.dtype = dtype
        self.width = width

    def shards(self) -> list[str]:
        """Return the names of the shards that are whole."""
        return sorted(path.stem for path in self.folder.glob("*.npy") if path.with_suffix(".bin").exists())

    def find(self, keys: np.ndarray, names: list[str] | None = None) -> np.ndarray:
        """Return the place [S] of each key [S] (PLACE); `shard` is -1 where nothing is stored.

        names: of the shards that are looked through, which `shard` counts; default: those that are whole now.
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
        """Return the list of a shard; what lies beyond its file, which a disk may have lost, is left out."""
        entries = load_array(self.folder / f"{name}.npy")
        num_bytes = os.path.getsize(self.folder / f"{name}.bin")
        ends = entries["offset"] + np.maximum(entries["num_crops"], 1) * self._crop_bytes(entries["num_features"])
        return entries[ends <= num_bytes]

    def _crop_bytes(self, num_features):
        return np.int64(num_features) * self.width * self.dtype.itemsize

    def view(self, keys: np.ndarray, starts: np.ndarray) -> "FeatureView":
        """Return the features of pictures by record: record i has the pictures starts[i] to starts[i + 1] of keys [S].

        An empty key stands for a picture that cannot be used: DataError when it is asked for. Raises KeyError if
        another one is not stored.
        """
        # Listed once: other processes add shards at any time, and a number must go on meaning the same one.
        names = self.shards()
        places = self.find(keys, names)
        missing = int(((places["shard"] < 0) & (keys != b"")).sum())
        if missing:
            raise KeyError(f"{missing} of {len(keys)} pictures have no features in {self.folder}.")
        path = self.folder / "views" / key_of(keys.tobytes(), starts.tobytes(), *names)
        path.parent.mkdir(parents=True, exist_ok=True)
        for part, array in (("places", places), ("starts", starts)):
            save_array(path.with_suffix(f".{part}"), array)
        return FeatureView(self, names, path)

    def sweep(self) -> None:
        """Throw away what killed writers have left behind."""
        for path in [*self.folder.glob("*.bin"), *self.folder.rglob("*.part")]:
            is_whole = path.suffix == ".bin" and path.with_suffix(".npy").exists()
            # Another rank sweeps at the same time, or a writer has just finished.
            with suppress(FileNotFoundError):
                if not is_whole and time.time() - path.stat().st_mtime > ORPHAN_S:
                    path.unlink()


class FeatureView:
    """The stored features of a data set's pictures, by record; costs a process nothing but maps. Pickles to paths."""

    def __init__(self, store: FeatureStore, shards: list[str], path: Path):
        self.store = store
        self.shards = shards
        self.path = path
        self.places = load_array(path.with_suffix(".places"))
        self.starts = load_array(path.with_suffix(".starts"))
        self._map = lru_cache(maxsize=256)(self._open)

    def __reduce__(self):
        """Travel to a worker as paths."""
        return type(self), (self.store, self.shards, self.path)

    def _open(self, shard: int) -> np.ndarray:
        return np.memmap(self.store.folder / f"{self.shards[shard]}.bin", np.uint8, mode="r")

    def __getitem__(self, i: int) -> list[StoredPicture]:
        """Return the pictures of record i, in their order."""
        places = self.places[self.starts[i] : self.starts[i + 1]]
        if (places["shard"] < 0).any():
            raise DataError(f"record {i}: one of its pictures could not be used when features were made of them.")
        return [self._read(place) for place in places]

    def _read(self, place) -> StoredPicture:
        num_crops, num_features, start = int(place["num_crops"]), int(place["num_features"]), int(place["offset"])
        shape = (num_features, self.store.width)
        shape = (num_crops, *shape) if num_crops else shape
        stop = start + int(np.prod(shape)) * self.store.dtype.itemsize
        # Copied: the map is read-only, and a batch is a copy anyway.
        data = torch.from_numpy(np.array(self._map(int(place["shard"]))[start:stop]))
        return StoredPicture(tuple(place["size"].tolist()), data.view(self.store.dtype).view(shape))


class FeatureWriter:
    """Writes features into shards of its own; used in a `with`, at whose end all of them are there to be read."""

    def __init__(self, store: FeatureStore):
        self.store = store
        self.file = None
        self.entries = []

    def __enter__(self):
        self.store.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *error):
        # What is written by now is whole, whatever stopped the rest.
        self.close_shard()

    def add(self, key: bytes, features: torch.Tensor, size: tuple[int, int]) -> None:
        """Write the features [P, C] of a picture, or of its crops [n, P, C]; size: its width and height."""
        if features.dtype != self.store.dtype or features.shape[-1] != self.store.width:
            raise ValueError(
                f"features are {features.dtype} of width {features.shape[-1]}; this folder holds {self.store.dtype} "
                f"of width {self.store.width}."
            )
        if self.file is None:
            name = f"{socket.gethostname()[:20]}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
            self.file = open(self.store.folder / f"{name}.bin", "wb")  # noqa: SIM115 - closed in close_shard
        num_crops = len(features) if features.dim() == 3 else 0
        self.entries.append((key, self.file.tell(), num_crops, features.shape[-2], tuple(size)))
        self.file.write(features.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        if self.file.tell() >= SHARD_BYTES:
            self.close_shard()

    def close_shard(self) -> None:
        """Let everybody read what was added so far."""
        if self.file is None:
            return
        path, file, entries = Path(self.file.name), self.file, self.entries
        self.file, self.entries = None, []
        try:
            file.flush()
            os.fsync(file.fileno())
            file.close()
            save_array(path.with_suffix(".npy"), np.array(entries, ENTRY))
        except OSError:
            # A full disk: what nobody can read must not go on filling it.
            with suppress(OSError):
                file.close()
            path.unlink(missing_ok=True)
            raise
