"""Turn a shard into raw records, from any place in it on: what a shard and a place are, and WebDataset's tar files.

`datasets` reads the same files, but goes on in one only by reading it again from its start.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from llava_lite.data.scan import DataError

# Larger than any picture that is read: a broken header may claim terabytes.
MAX_MEMBER_BYTES = 2**30
REMOTE_BLOCK_BYTES = 2**23


class Shard(NamedTuple):
    """A file of records."""

    path: str  # a local path, or an address such as hf://datasets/user/name/0000.tar
    kind: str  # a key of SHARD_FORMATS
    num_bytes: int

    @property
    def name(self) -> str:
        """Its name for messages."""
        return os.path.basename(self.path)


class Place(NamedTuple):
    """Where the next record of a shard begins."""

    offset: int = 0  # a byte of a tar file, a row of a table
    number: int = 0  # records before it


class RawRecord(NamedTuple):
    """A record as it lies in the shard, or the reason why it cannot be read."""

    key: str
    number: int
    parts: dict  # suffix -> bytes of a tar file, column -> value of a table
    after: Place
    error: DataError | None = None


START = Place()


def open_shard(path: str):
    """Return the open file; a remote one reads ahead a block at a time and can be sought in."""
    if "://" not in path:
        return open(path, "rb")
    from fsspec.core import url_to_fs

    files, name = url_to_fs(path)
    return files.open(name, "rb", block_size=REMOTE_BLOCK_BYTES)


# Tar files, as WebDataset writes them: the files of a record stand together and share a name up to the first point.


def _headers(file, name: str, offset: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yield each header from byte `offset` on, and the byte behind its file; DataError where the archive is broken.

    TarFile.next() would take a broken header, or a cut, for the end, and remembers every member.
    """
    # An empty archive: an object for fromtarfile() to read through.
    with tarfile.TarFile(fileobj=io.BytesIO(bytes(1024))) as archive:
        archive.fileobj, archive.offset = file, offset
        while True:
            start = archive.offset
            try:
                file.seek(start)
                header = tarfile.TarInfo.fromtarfile(archive)
            except tarfile.EOFHeaderError:
                return
            except tarfile.EmptyHeaderError:
                raise DataError(
                    f"{name} ends at byte {start} without the end mark of a tar file: cut short? "
                    "Records behind it are not read."
                ) from None
            except (tarfile.HeaderError, ValueError, OverflowError) as error:
                raise DataError(
                    f"{name}, byte {start}: no header of a tar file ({error}). Records behind it are not read."
                ) from None
            if header.size < 0:
                raise DataError(
                    f"{name}, byte {start}: {header.name!r} has {header.size:,} bytes. Records behind it are not read."
                )
            yield header, archive.offset


def _key_and_suffix(path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    stem, _, suffix = name.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


def _content(file, header: tarfile.TarInfo, name: str) -> bytes:
    file.seek(header.offset_data)
    data = file.read(header.size)
    if len(data) < header.size:
        raise DataError(
            f"{name} ends inside {header.name!r}: {len(data):,} of {header.size:,} bytes. Cut short? "
            "Records behind it are not read."
        )
    return data


def read_tar(shard: Shard, place: Place = START, part: int = 0, num_parts: int = 1) -> Iterator[RawRecord]:
    """Yield the records from `place` on whose number modulo `num_parts` is `part`, in the order of the file."""
    key, parts, number, error = None, {}, place.number, None
    with open_shard(shard.path) as file:
        end = place.offset
        for header, behind in _headers(file, shard.name, place.offset):
            if not header.isfile() or header.name.rpartition("/")[2].startswith("."):
                continue
            end, (its_key, suffix) = behind, _key_and_suffix(header.name)
            if its_key != key:
                if key is not None:
                    if number % num_parts == part:
                        yield RawRecord(key, number, parts, Place(header.offset, number + 1), error)
                    number += 1
                key, parts, error = its_key, {}, None
            if number % num_parts != part:
                continue
            if header.size > MAX_MEMBER_BYTES:
                size = f"{header.size:,} bytes; a record's file has a few million"
                error = DataError(f"{shard.name}[{number}]: {header.name!r} has {size}.")
            else:
                parts[suffix] = _content(file, header, shard.name)
        if key is not None and number % num_parts == part:
            yield RawRecord(key, number, parts, Place(end, number + 1), error)
