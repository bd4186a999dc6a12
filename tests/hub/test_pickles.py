"""A file of torch.save is refused before it is unpickled if it would take more memory than it has bytes."""

import io
import resource
import struct
import time
import zipfile

import pytest
import torch

from llava_lite.checkpoints.copying import read_weights
from llava_lite.checkpoints.engine_files import check_no_code
from llava_lite.checkpoints.torch_files import read_torch_file
from llava_lite.hub import pickles
from llava_lite.hub.pickles import LARGEST_PICKLE, MOST_OPCODES, PackedPickle, check_unpacked_size, load_pickle
from llava_lite.media.files import MediaError, read_array
from llava_lite.train.saving.interrupt import ProgressCallback
from llava_lite.train.saving.other_ranks import read_progress

STATE = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
PACKED = r"its entry '\w+/data\.pkl' unpacks from [\d,]+ bytes to [\d,]+; expected entries that are not compressed"


def as_bytes(content=STATE, **options):
    torch.save(content, found := io.BytesIO(), **options)
    return found.getvalue()


def repack(data, change, compression=zipfile.ZIP_STORED):
    """Return an archive whose entries are those that `change` makes of the old ones."""
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(found := io.BytesIO(), "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return found.getvalue()


def bomb(num_bytes=2**28):
    """Return a deflated archive whose pickle goes on with zeros after its end, which torch would read too."""
    added = bytes(num_bytes)
    return repack(
        as_bytes(), lambda name, old: old + added if name.endswith(".pkl") else old, compression=zipfile.ZIP_DEFLATED
    )


@pytest.mark.parametrize(
    "read",
    [
        lambda path: read_weights(path.rename(path.with_name("w.bin"))),
        read_torch_file,
        lambda path: check_no_code(path.parent),
        lambda path: ProgressCallback(None).load(path),
        lambda path: read_progress(path.parent, 1),
        load_pickle,
        lambda path: load_pickle(path.read_bytes()),
    ],
    ids=["weights", "other systems", "engine", "progress", "other ranks", "path", "bytes"],
)
def test_a_packed_pickle_is_refused_before_it_is_unpacked(tmp_path, read):
    (tmp_path / "progress_0.pt").write_bytes(bomb())
    before_kb, started_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(PackedPickle, match=PACKED):
        read(tmp_path / "progress_0.pt")
    # The pickle alone has 256 MiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 100_000
    assert time.monotonic() - started_s < 10


def test_a_packed_pickle_of_numbers_is_refused_too():
    with pytest.raises(MediaError, match=PACKED):
        read_array("sound", "there.pt", bomb(2**20))


def test_entries_that_lie_over_each_other_are_refused(tmp_path):
    large = as_bytes({"a": torch.zeros(10_000)})
    with zipfile.ZipFile(io.BytesIO(large)) as archive:
        entries = archive.infolist()
    # The entry of the values is listed once more, in place of another: the same bytes are counted twice.
    place = next(entry for entry in entries if entry.filename.endswith("data/0"))
    other = next(entry for entry in entries if entry.filename.endswith("version"))
    start = large.index(b"PK\x01\x02", large.index(b"PK\x01\x02"))
    at = large.index(other.filename.encode(), start) - 46
    changed = bytearray(large)
    changed[at + 20 : at + 28] = struct.pack("<II", place.file_size, place.file_size)
    changed[at + 42 : at + 46] = struct.pack("<I", place.header_offset)
    with pytest.raises(PackedPickle, match=r"entries have [\d,]+ together"):
        load_pickle(bytes(changed))


@pytest.mark.parametrize("is_archive", [True, False], ids=["archive", "plain pickle"])
def test_a_pickle_is_bounded_in_bytes_and_opcodes(is_archive, monkeypatch):
    def write(pickled):
        if not is_archive:
            return pickled
        return repack(as_bytes(), lambda name, old: pickled if name.endswith(".pkl") else old)

    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpickled"))
    with pytest.raises(PackedPickle, match=r"a pickle of more than 8,[\d,]+ opcodes"):
        load_pickle(write(b"\x80\x02(" + b"]" * (MOST_OPCODES + 1000) + b"l."))
    text = b"\x80\x02X" + struct.pack("<I", LARGEST_PICKLE + 2**20) + b"a" * (LARGEST_PICKLE + 2**20)
    with pytest.raises(PackedPickle, match=r"a pickle of more than 16,[\d,]+ bytes, tensors not counted"):
        load_pickle(write(text + b"." + bytes(100)))


def test_what_torch_writes_is_read(tmp_path, monkeypatch):
    many = {f"model.layers.{number}.weight": torch.ones(1) for number in range(3000)}
    # Names alone need more than a bound that does not grow with the tensors.
    monkeypatch.setattr(pickles, "LARGEST_PICKLE", 0)
    monkeypatch.setattr(pickles, "MOST_OPCODES", 0)
    torch.save(many, tmp_path / "many.bin")
    assert load_pickle(tmp_path / "many.bin", mmap=True).keys() == many.keys()
    monkeypatch.undo()
    for old in (False, True):
        torch.save(STATE, tmp_path / "w.bin", _use_new_zipfile_serialization=not old)
        check_unpacked_size(tmp_path / "w.bin")
        for mmap in (False, True):
            found = load_pickle(tmp_path / "w.bin", mmap=mmap)
            assert all(torch.equal(found[name], STATE[name]) for name in STATE)
        assert torch.equal(load_pickle((tmp_path / "w.bin").read_bytes())["a"], STATE["a"])


@pytest.mark.parametrize("length", [3, 100, -30, -1])
@pytest.mark.parametrize("old", [False, True], ids=["archive", "plain pickle"])
def test_a_file_that_is_cut_is_still_named_so(tmp_path, old, length):
    file = tmp_path / "w.bin"
    file.write_bytes(as_bytes(_use_new_zipfile_serialization=not old)[:length])
    with pytest.raises(ValueError, match=r"w\.bin' cannot be read as weights"):
        read_weights(file)
