"""Read raw records from any position of a shard: the types, and WebDataset's tar files.

`datasets` reads the same files, but resumes inside one only by reading it again from its start.
"""

import io
import os
import platform
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from llava_lite.data.errors import DataError

# Larger than any image that is read: a corrupt header may name terabytes.
MAX_MEMBER_BYTES = 2**30
REMOTE_BLOCK_BYTES = 2**23


class Shard(NamedTuple):
    """A file of records."""

    path: str  # a local path, or a URL such as hf://datasets/user/name/0000.tar
    kind: str  # a key of SHARD_FORMATS
    num_bytes: int

    @property
    def name(self) -> str:
        """The file's name, for messages."""
        return os.path.basename(self.path)


class Place(NamedTuple):
    """The start of the next record of a shard."""

    offset: int = 0  # byte of a tar file, row of a table
    number: int = 0  # of records before it


class RawRecord(NamedTuple):
    """A record as the shard stores it, or the reason why it cannot be read."""

    key: str
    number: int
    parts: dict  # suffix -> bytes of a tar file, column -> value of a table
    after: Place
    error: DataError | None = None


START = Place()


def open_shard(path: str):
    """Return the open file; a remote one can seek, and reads ahead a block at a time."""
    if "://" not in path:
        return open(path, "rb")
    from fsspec.core import url_to_fs

    files, name = url_to_fs(path)
    return files.open(name, "rb", block_size=REMOTE_BLOCK_BYTES)


# Tar files, as WebDataset writes them: the files of a record are adjacent and share their name up to the first dot.


def _open_tar(file, offset: int) -> tarfile.TarFile:
    """Return a tar archive from which TarInfo.fromtarfile reads the header at byte `offset` of a file.

    `TarFile.next` would take a corrupt header, or the end of a truncated file, for the end of the archive, and keeps
    all members in memory. The documented `fromtarfile` does neither, but the position that it reads from is set by two
    undocumented attributes. RuntimeError where Python has them no longer.
    """
    # Two empty blocks: an empty archive.
    archive = tarfile.TarFile(fileobj=io.BytesIO(bytes(1024)))
    missing = {"fileobj", "offset"} - vars(archive).keys()
    if missing:
        raise RuntimeError(
            f"tar shards cannot be read with Python {platform.python_version()}: its tarfile.TarFile has no attribute "
            f"{' and '.join(sorted(missing))}, by which llava_lite resumes inside a shard. Use Python 3.10 to 3.14."
        )
    archive.fileobj, archive.offset = file, offset
    return archive


def _headers(file, name: str, offset: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yield each header from byte `offset` on, and the byte after its file; DataError where the archive is corrupt."""
    with _open_tar(file, offset) as archive:
        while True:
            start = archive.offset
            try:
                file.seek(start)
                header = tarfile.TarInfo.fromtarfile(archive)
            except tarfile.EOFHeaderError:
                return
            except tarfile.EmptyHeaderError:
                raise DataError(
                    f"{name} ends at byte {start} without the end of a tar file: cut short? "
                    "Records after it are not read."
                ) from None
            except (tarfile.HeaderError, ValueError, OverflowError) as error:
                raise DataError(
                    f"{name}, byte {start}: no header of a tar file ({error}). Records after it are not read."
                ) from None
            if header.size < 0:
                raise DataError(
                    f"{name}, byte {start}: {header.name!r} has {header.size:,} bytes. Records after it are not read."
                )
            yield header, archive.offset


def _key_and_suffix(path: str) -> tuple[str, str]:
    directory, _, name = path.rpartition("/")
    stem, _, suffix = name.partition(".")
    return (f"{directory}/{stem}" if directory else stem), suffix.lower()


def _content(file, header: tarfile.TarInfo, name: str) -> bytes:
    file.seek(header.offset_data)
    data = file.read(header.size)
    if len(data) < header.size:
        raise DataError(
            f"{name} ends inside {header.name!r}: {len(data):,} of {header.size:,} bytes. Cut short? "
            "Records after it are not read."
        )
    return data


def read_tar(shard: Shard, place: Place = START, part: int = 0, num_parts: int = 1) -> Iterator[RawRecord]:
    """Yield the records from `place` on with number % num_parts == part, in the order of the file."""
    key, parts, number, error = None, {}, place.number, None
    with open_shard(shard.path) as file:
        end = place.offset
        for header, next_offset in _headers(file, shard.name, place.offset):
            if not header.isfile() or header.name.rpartition("/")[2].startswith("."):
                continue
            end, (its_key, suffix) = next_offset, _key_and_suffix(header.name)
            if its_key != key:
                if key is not None:
                    if number % num_parts == part:
                        yield RawRecord(key, number, parts, Place(header.offset, number + 1), error)
                    number += 1
                key, parts, error = its_key, {}, None
            if number % num_parts != part:
                continue
            if header.size > MAX_MEMBER_BYTES:
                error = DataError(
                    f"{shard.name}[{number}]: {header.name!r} has {header.size:,} bytes, over {MAX_MEMBER_BYTES:,}."
                )
            else:
                parts[suffix] = _content(file, header, shard.name)
        if key is not None and number % num_parts == part:
            yield RawRecord(key, number, parts, Place(end, number + 1), error)
