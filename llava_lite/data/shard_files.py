"""Turn a shard (a WebDataset tar file or a parquet file, local or hf://) into raw records, from any place in it on.

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
PARQUET_BATCH_ROWS = 16
CAPTION_KEYS = ("caption", "text", "txt")
PICTURE_COLUMNS = ("image", "images", "jpg", "jpeg", "png", "webp")
ID_COLUMNS = ("id", "key", "__key__")


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

    offset: int = 0  # a byte of a tar file, a row of a parquet file
    number: int = 0  # records before it


class RawRecord(NamedTuple):
    """A record as it lies in the shard, or the reason why it cannot be read."""

    key: str
    number: int
    parts: dict  # suffix -> bytes of a tar file, column -> value of a parquet file
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


# Parquet files: a column of pictures, beside captions or conversations.


def read_parquet(shard: Shard, place: Place = START, part: int = 0, num_parts: int = 1) -> Iterator[RawRecord]:
    """Yield the rows from `place` on whose number modulo `num_parts` is `part`, in the order of the file."""
    import pyarrow
    from pyarrow import parquet

    try:
        with open_shard(shard.path) as file:
            table = parquet.ParquetFile(file)
            wanted = {*PICTURE_COLUMNS, *CAPTION_KEYS, *ID_COLUMNS, "conversations"}
            columns = [name for name in table.schema_arrow.names if name in wanted]
            has_captions = set(CAPTION_KEYS) & set(columns) and set(PICTURE_COLUMNS) & set(columns)
            if "conversations" not in columns and not has_captions:
                raise DataError(
                    f"{shard.name} has the columns {', '.join(table.schema_arrow.names) or '(none)'}; expected "
                    f"conversations, or one of {', '.join(CAPTION_KEYS)} beside one of {', '.join(PICTURE_COLUMNS)}."
                )
            row = 0
            for group in range(table.num_row_groups):
                num_rows = table.metadata.row_group(group).num_rows
                if row + num_rows <= place.number:
                    row += num_rows
                    continue
                for batch in table.iter_batches(PARQUET_BATCH_ROWS, row_groups=[group], columns=columns):
                    for k in range(batch.num_rows):
                        if row >= place.number and row % num_parts == part:
                            yield _row(batch, k, row, shard.name)
                        row += 1
    except (pyarrow.ArrowException, OSError) as error:
        # Arrow says OSError of broken pages too; that of a disk has a number, that of a network a class of its own.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        raise DataError(f"{shard.name}: no parquet file, or a broken one ({' '.join(str(error).split())}).") from None


def _row(batch, k: int, row: int, name: str) -> RawRecord:
    """Return row k of a batch, which is row `row` of the file."""
    after = Place(row + 1, row + 1)
    try:
        parts = {column: batch.column(column)[k].as_py() for column in batch.schema.names}
    except UnicodeDecodeError as error:
        return RawRecord(str(row), row, {}, after, DataError(f"{name}[{row}]: a text is not UTF-8 ({error.reason})."))
    return RawRecord(_row_key(parts, row), row, parts, after)


def _row_key(parts: dict, row: int) -> str:
    return str(next((parts[name] for name in ID_COLUMNS if parts.get(name) is not None), row))
