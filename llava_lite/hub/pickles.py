"""Read a file of torch.save, once it is known that it unpacks to no more than it holds."""

from __future__ import annotations

import pickletools
import zipfile
from io import BytesIO
from pathlib import Path

import torch

# Of a pickle without the values of its tensors, and more for each entry of its archive, most of which are tensors: 300
# bytes and 25 opcodes a tensor are usual. An opcode of one byte may become a list of 64 bytes, in a microsecond.
LARGEST_PICKLE, LARGEST_OF_ENTRY = 16 * 2**20, 2**10
MOST_OPCODES, MOST_OF_ENTRY = 8_000_000, 64
# Before torch 1.6 a file was no archive but this many pickles, and then the values of its tensors.
NUM_PICKLES = 5
ARCHIVE, ADVICE = b"PK\x03\x04", "torch.save writes no such file: ask whoever wrote it for a safetensors file."


class PackedPickle(ValueError):
    """A file of torch.save that would unpack to more than it holds; the message is complete."""


def load_pickle(source: str | Path | bytes, mmap: bool = False):
    """Return what a file of torch.save holds, or its bytes do, on the CPU and without running code in it.

    mmap: map the tensors where the file's layout allows it. Raises PackedPickle, and torch's own errors.
    """
    check_unpacked_size(source)
    is_bytes = isinstance(source, bytes)
    return torch.load(
        BytesIO(source) if is_bytes else source,
        map_location="cpu",
        weights_only=True,
        # What torch wrote before 1.6 cannot be mapped.
        mmap=mmap and not is_bytes and zipfile.is_zipfile(source),
    )


def check_unpacked_size(source: str | Path | bytes) -> None:
    """Raise PackedPickle for a file, or its bytes, that would take far more memory than it has bytes.

    The names and sizes of an archive's entries are read, of an older file its opcodes. Raises zipfile.BadZipFile for
    an archive that is cut; anything else that is no file of torch.save passes, since torch says so.
    """
    name = "the file" if isinstance(source, bytes) else repr(str(source))
    with BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as stream:
        # As torch tells the two apart.
        is_archive = stream.read(len(ARCHIVE)) == ARCHIVE
        stream.seek(0)
        check_entries(name, stream) if is_archive else check_opcodes(name, stream)


def check_entries(name: str, stream) -> None:
    """Raise PackedPickle for an archive with compressed or overlapping entries, or with too long a pickle."""
    num_bytes = stream.seek(0, 2)
    archive = zipfile.ZipFile(stream)
    entries = archive.infolist()
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise PackedPickle(
                f"{name} has {num_bytes:,} bytes, and its entry {entry.filename!r} unpacks from "
                f"{entry.compress_size:,} bytes to {entry.file_size:,}; expected entries that are not compressed. "
                f"{ADVICE}"
            )
    total = sum(entry.file_size for entry in entries)
    if total > num_bytes:
        raise PackedPickle(
            f"{name} has {num_bytes:,} bytes, and its {len(entries):,} entries have {total:,} together. {ADVICE}"
        )
    for entry in entries:
        if entry.filename.endswith(".pkl"):
            with archive.open(entry) as pickled:
                check_opcodes(f"{name} ({entry.filename})", pickled, len(entries), 1)


def check_opcodes(name: str, stream, num_entries: int = 0, num_pickles: int = NUM_PICKLES) -> None:
    """Raise PackedPickle if the pickles at the start of a stream, which are not read further, are too long."""
    largest = LARGEST_PICKLE + LARGEST_OF_ENTRY * num_entries
    most = MOST_OPCODES + MOST_OF_ENTRY * num_entries
    head = BytesIO(stream.read(largest))
    is_cut, num_opcodes = bool(stream.read(1)), 0
    for _ in range(num_pickles):
        try:
            for _ in pickletools.genops(head):
                num_opcodes += 1
                if num_opcodes > most:
                    raise PackedPickle(f"{name} holds a pickle of more than {most:,} opcodes. {ADVICE}")
        except PackedPickle:
            raise
        # Where the file ends inside a pickle, or is none, torch says so.
        except Exception as error:
            if is_cut and head.tell() >= largest:
                raise PackedPickle(
                    f"{name} holds a pickle of more than {largest:,} bytes, tensors not counted. {ADVICE}"
                ) from error
            return
