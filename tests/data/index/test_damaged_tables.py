"""A table of the index that is damaged on disk is found by its checksum and made again; nothing is read from it."""

import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest

from llava_lite.data.dataset import open_dataset
from llava_lite.data.index import cache
from llava_lite.data.index.cache import DamagedArray, load_array, save_array
from llava_lite.errors import DiskError
from llava_lite.media.preprocess import load_image_processor


def write_new(path, content):
    """Replace a file; the new one has another inode, as one that was copied back has."""
    beside = path.with_suffix(".new")
    beside.write_bytes(content)
    os.replace(beside, path)


def flip(content, place):
    changed = bytearray(content)
    changed[int(place * (len(changed) - 1))] ^= 4
    return bytes(changed)


HARMS = {
    "a bit of the header": lambda content: flip(content, 0.01),
    "a bit of the numbers": lambda content: flip(content, 0.6),
    "a bit of the checksum": lambda content: flip(content, 1),
    "cut": lambda content: content[:-30],
    "empty": lambda content: b"",
    "without a checksum": lambda content: content[: -len(cache.MARK) - 4],
    "longer": lambda content: content + b"\0",
}


@pytest.fixture
def reopen(oddities, toy_tokenizer, toy_tower_dir):
    """Return a function that opens the data set as a new process does, and returns what its index says."""
    path, images, _ = oddities
    processor = load_image_processor(toy_tower_dir("clip"))

    def open_again():
        cache._compared.clear()
        dataset, report = open_dataset(
            path, toy_tokenizer, processor, "v1", images, bad_record="skip", max_bad_fraction=0.2
        )
        annotations = dataset.annotations
        facts = [*annotations.record_facts(), *annotations.token_facts(), annotations.image_sizes, dataset.lengths]
        return [fact.tolist() for fact in facts], [str(bad) for bad in report.bad], report.digest

    return open_again


def get_tables(directory):
    return sorted(path for path in Path(directory).rglob("*.npy"))


@pytest.mark.parametrize("harm", HARMS)
def test_every_damaged_table_is_made_again(reopen, index_directory, caplog, harm):
    expected = reopen()
    names = {path.name.partition("-")[0].partition(".")[0] for path in get_tables(index_directory)}
    assert names >= {"spans", "records", "tokens"}
    for table in get_tables(index_directory):
        content = table.read_bytes()
        write_new(table, HARMS[harm](content))
        caplog.clear()
        assert reopen() == expected
        assert f"{table} is damaged" in caplog.text
        assert table.read_bytes() == content
    caplog.clear()
    assert reopen() == expected
    assert "damaged" not in caplog.text


def test_a_table_that_is_damaged_while_a_run_reads_it_ends_the_run(reopen, index_directory, oddities):
    from llava_lite.data.index.annotations import open_annotations

    reopen()
    annotations = open_annotations(oddities[0], oddities[1])
    (records,) = index_directory.rglob("records.npy")
    write_new(records, flip(records.read_bytes(), 0.7))
    with pytest.raises(DamagedArray, match=rf"{records.name} is damaged \(its checksum differs\)\. Start again"):
        annotations.record_facts()
    (spans,) = index_directory.rglob("spans.npy")
    travelled = pickle.dumps(annotations)
    write_new(spans, flip(spans.read_bytes(), 0.7))
    with pytest.raises(DamagedArray, match=r"spans\.npy is damaged"):
        pickle.loads(travelled)


def test_an_array_is_compared_once_in_a_process(tmp_path, monkeypatch):
    save_array(tmp_path / "a.npy", np.arange(5))
    reads, get_checksum = [], cache.get_checksum
    monkeypatch.setattr(cache, "get_checksum", lambda *args: reads.append(args) or get_checksum(*args))
    for _ in range(3):
        assert load_array(tmp_path / "a.npy").tolist() == [0, 1, 2, 3, 4]
    assert len(reads) == 1
    assert load_array(tmp_path / "b.npy") is None


@pytest.mark.parametrize("size", [1, 9])
def test_an_array_that_another_process_replaces_meanwhile_is_not_taken_for_damaged(tmp_path, monkeypatch, size):
    path = tmp_path / "a.npy"
    save_array(path, np.arange(5))

    def replace_and_open(*args):
        monkeypatch.undo()
        save_array(path, np.arange(size))
        return open(*args)

    monkeypatch.setattr(cache, "open", replace_and_open, raising=False)
    assert load_array(path).tolist() == list(range(size))


def test_a_directory_that_is_full_is_named_with_the_bytes(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DiskError) as error:
            save_array(tmp_path / "a.npy", np.zeros(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'a.npy'} cannot be written: File too large; 8,000 bytes are needed, ")
    assert f"bytes are free in {tmp_path}. Make room there" in text
    assert os.listdir(tmp_path) == []


def test_a_directory_in_the_place_of_a_file_is_to_be_removed(reopen, index_directory):
    expected = reopen()
    for table in [*get_tables(index_directory), *index_directory.rglob("*.lock")]:
        content = table.read_bytes()
        table.unlink()
        table.mkdir()
        if table.suffix == ".lock":
            # Only who makes a table takes its lock.
            with pytest.raises(DiskError) as error, cache.locked(table.with_suffix(""), "test"):
                pass
        else:
            with pytest.raises(DiskError) as error:
                reopen()
        assert str(error.value).startswith(f"{table} is a directory, and a file belongs in its place. Remove the dir")
        assert "room" not in str(error.value)
        table.rmdir()
        table.write_bytes(content)
        assert reopen() == expected
    (index_directory / "a.npy").mkdir()
    with pytest.raises(DiskError, match=r"a\.npy is a directory, and a file belongs in its place"):
        save_array(index_directory / "a.npy", np.arange(5))
    assert not list(index_directory.rglob("*.part"))


def test_a_file_in_the_place_of_a_directory_is_to_be_removed(tmp_path):
    (tmp_path / "a").touch()
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(DiskError, match=rf"^{path} cannot be made: a file is in its place, .* Remove that file"):
            cache.make_directory(path)


@pytest.mark.parametrize("name", ["~nobody_here/x", "a\0b", "a\ud800b"])
def test_an_index_directory_that_cannot_be_is_named(name):
    with pytest.raises(OSError, match="Set LLAVA_LITE_CACHE to a directory that you may write") as error:
        cache.cache_root(name)
    assert repr(name) in str(error.value)


def test_a_directory_that_cannot_be_used_is_named(reopen, index_directory):
    # A file in its place: nobody can make a directory there, root neither.
    reopen()
    for directory in index_directory.iterdir():
        if directory.is_dir() and (directory / "spans.npy").exists():
            os.rename(directory, directory.with_name("away"))
            directory.write_text("")
            with pytest.raises(
                OSError, match=rf"{directory}/spans.npy cannot be read: .*LLAVA_LITE_CACHE for indexes"
            ):
                reopen()
