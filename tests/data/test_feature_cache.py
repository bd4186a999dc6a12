"""Features on disk are those that were written, bit for bit, whoever wrote them and however it ended."""

import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from llava_lite.data import feature_cache
from llava_lite.data.feature_cache import KEY, FeatureStore, FeatureWriter
from llava_lite.errors import DiskError

P, C = 4, 6


def key(number):
    return f"{number:024d}".encode()


def keys(*numbers):
    return np.array([key(number) for number in numbers], KEY)


def features(number, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(*(shape or (P, C)), generator=generator).to(dtype)


@pytest.fixture
def store(tmp_path):
    return FeatureStore(tmp_path / "store", torch.float32, C)


def write(store, *numbers):
    with FeatureWriter(store) as writer:
        for number in numbers:
            writer.add(key(number), features(number), (number, 2 * number))


def one_each(store, *numbers):
    """Return the features of records with one image each."""
    return store.view(keys(*numbers), np.arange(len(numbers) + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(P, C), (3, P, C)])
def test_what_was_written_is_read_bit_for_bit(tmp_path, dtype, shape):
    store = FeatureStore(tmp_path, dtype, C)
    written = [features(number, *shape, dtype=dtype) for number in range(5)]
    with FeatureWriter(store) as writer:
        for number, one in enumerate(written):
            writer.add(key(number), one, (10 + number, 20))
    view = store.view(keys(4, 0, 0, 3), np.array([0, 1, 1, 4]))
    assert [[image.size for image in view[i]] for i in range(3)] == [
        [(14, 20)],
        [],
        [(10, 20), (10, 20), (13, 20)],
    ]
    for image, number in zip([*view[0], *view[2]], (4, 0, 0, 3), strict=True):
        assert image.features.dtype == dtype
        assert torch.equal(image.features, written[number])


def test_shards_of_several_writers_are_one_store(store, monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 2 * P * C * 4)
    write(store, 1, 2, 3, 4, 5)
    write(store, 7, 6)
    assert len(store.shards()) == 4
    assert (store.find(keys(9, 5, 0, 6))["shard"] >= 0).tolist() == [False, True, False, True]
    view = one_each(store, 6, 1, 5, 3)
    for i, number in enumerate((6, 1, 5, 3)):
        assert torch.equal(view[i][0].features, features(number))


def test_an_image_that_is_not_stored_is_named_by_number(store):
    write(store, 1)
    with pytest.raises(KeyError, match="2 of 3 images have no features"):
        one_each(store, 1, 2, 3)
    assert (FeatureStore(store.directory / "none", torch.float32, C).find(keys(1))["shard"] < 0).all()


def test_features_of_another_kind_are_refused(store):
    with FeatureWriter(store) as writer:
        with pytest.raises(ValueError, match=r"torch.bfloat16 of width 6; this directory has torch.float32"):
            writer.add(key(1), features(1, dtype=torch.bfloat16), (1, 1))
        with pytest.raises(ValueError, match="width 5"):
            writer.add(key(1), features(1, P, 5), (1, 1))


def test_a_view_travels_as_paths_and_reads_the_same(store):
    write(store, *range(100))
    view = one_each(store, *range(100))
    data = pickle.dumps(view)
    assert len(data) < 1000
    assert torch.equal(pickle.loads(data)[42][0].features, features(42))


def test_what_has_no_list_yet_is_not_read(store):
    with FeatureWriter(store) as writer:
        writer.add(key(1), features(1), (1, 1))
        assert store.shards() == []
        assert (store.find(keys(1))["shard"] < 0).all()
    assert len(store.shards()) == 1


def test_entries_beyond_the_end_of_a_cut_file_are_not_read(store):
    write(store, 1, 2, 3)
    (path,) = store.directory.glob("*.bin")
    os.truncate(path, 3 * P * C * 4 - 1)
    assert (store.find(keys(1, 2, 3))["shard"] >= 0).tolist() == [True, True, False]


@pytest.mark.parametrize("content", [b"", b"list", None])
def test_a_damaged_list_names_nothing_and_its_features_are_made_again(store, caplog, content):
    write(store, 1, 2)
    (path,) = store.directory.glob("*.npy")
    if content is None:
        content = bytearray(path.read_bytes())
        content[-40] ^= 1
    path.unlink()
    path.write_bytes(content)
    assert (store.find(keys(1, 2))["shard"] < 0).all()
    assert f"{path} is damaged" in caplog.text
    assert not path.exists()
    write(store, 1, 2)
    caplog.clear()
    assert torch.equal(one_each(store, 2)[0][0].features, features(2))
    assert caplog.text == ""


def test_the_features_of_a_damaged_list_stay_a_while_and_are_swept_then(store):
    write(store, 1)
    (path,) = store.directory.glob("*.npy")
    features_path, long_ago = path.with_suffix(".bin"), time.time() - 2 * feature_cache.ORPHAN_S
    os.utime(features_path, (long_ago, long_ago))
    path.write_bytes(b"list")
    store.find(keys(1))
    # A run that has read the list before may read them still.
    store.sweep()
    assert features_path.exists()
    os.utime(features_path, (long_ago, long_ago))
    store.sweep()
    assert not features_path.exists()


def test_a_list_that_is_damaged_while_its_features_are_dropped_holds_up_nobody(store):
    write(store, 1)
    (path,) = store.directory.glob("*.npy")
    path.write_bytes(b"list")
    store.drop(path.stem, 0)
    assert (store.find(keys(1))["shard"] < 0).all()
    assert not path.exists()


def test_a_full_disk_is_named_with_the_file_of_features(store):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(DiskError) as error:
            write(store, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    text = str(error.value)
    assert re.match(rf"{store.directory}/\S+\.bin cannot be written: File too large; [\d,]+ bytes are needed", text)
    assert not list(store.directory.glob("*.bin"))


@pytest.mark.parametrize("byte", [0, 40, P * C * 4 - 1])
def test_damaged_features_are_found_when_they_are_read_and_taken_off_the_list(store, byte):
    write(store, 1, 2, 3)
    view = one_each(store, 1, 2, 3)
    (path,) = store.directory.glob("*.bin")
    with open(path, "r+b") as file:
        file.seek(P * C * 4 + byte)
        value = file.read(1)[0]
        file.seek(P * C * 4 + byte)
        file.write(bytes([value ^ 16]))
    with pytest.raises(feature_cache.DamagedFeatures, match=rf"record 1: .* {path} at byte 96 .*Start again"):
        view[1]
    # The others are as they were, here and for whoever opens the store now.
    assert torch.equal(view[2][0].features, features(3))
    assert (store.find(keys(1, 2, 3))["shard"] >= 0).tolist() == [True, False, True]
    write(store, 2)
    assert [torch.equal(one_each(store, number)[0][0].features, features(number)) for number in (1, 2, 3)] == [
        True
    ] * 3


def test_damaged_features_are_dropped_before_a_run_and_by_several_ranks_at_once(store):
    write(store, *range(10))
    (path,) = store.directory.glob("*.bin")
    content = bytearray(path.read_bytes())
    for number in (2, 3, 7):
        content[number * P * C * 4 + 5] ^= 1
    path.write_bytes(content)
    found = keys(*range(10))
    # Ranks are processes; threads that parse at once can fail under early Python 3.11, and NumPy parses its headers.
    context = get_context("fork")
    with ProcessPoolExecutor(2, context, initializer=context.Barrier(2, timeout=60).wait) as pool:
        counts = list(pool.map(store.drop_damaged, (found[::2], found[1::2])))
    assert counts == [1, 2]
    assert np.flatnonzero(store.find(found)["shard"] < 0).tolist() == [2, 3, 7]


def test_only_old_remains_are_swept(store):
    write(store, 1)
    old, fresh, draft = (
        store.directory / "old.bin",
        store.directory / "fresh.bin",
        store.directory / "views" / "old.part",
    )
    draft.parent.mkdir(exist_ok=True)
    for path in (old, fresh, draft):
        path.write_bytes(b"half")
    long_ago = time.time() - 2 * feature_cache.ORPHAN_S
    for path in [old, draft, *store.directory.glob("*-*.bin")]:
        os.utime(path, (long_ago, long_ago))
    store.sweep()
    assert not old.exists()
    assert not draft.exists()
    assert fresh.exists()
    assert torch.equal(one_each(store, 1)[0][0].features, features(1))


def test_a_shard_that_comes_while_a_view_is_made_moves_no_other(store, tmp_path):
    write(store, 1, 2)
    other = FeatureStore(tmp_path / "other", torch.float32, C)
    write(other, 8, 9)

    class Busy(FeatureStore):
        """A store into which another run writes a shard, the first by name, whenever this one has listed it."""

        def shards(self):
            names = super().shards()
            for path in list(other.directory.glob("*.*")):
                path.rename(self.directory / f"a{path.suffix}")
            return names

    view = one_each(Busy(store.directory, torch.float32, C), 1, 2)
    assert [torch.equal(view[i][0].features, features(i + 1)) for i in (0, 1)] == [True, True]
    assert one_each(store, 9)[0][0].size == (9, 18)


def test_remains_that_another_rank_sweeps_at_the_same_time_are_no_error(store):
    write(store, 1)
    # What another rank has thrown away since the directory was listed looks like this to whoever opens it.
    (store.directory / "old.bin").symlink_to(store.directory / "gone")
    store.sweep()
    assert store.shards()


def test_a_shard_that_the_disk_has_no_room_for_leaves_no_file(store):
    write(store, 1)
    before = sorted(store.directory.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (P * C * 4, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(store, 2, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(store.directory.iterdir()) == before
    write(store, 2, 3)
    assert torch.equal(one_each(store, 3)[0][0].features, features(3))


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from data.test_feature_cache import feature_cache, FeatureStore, FeatureWriter, features, key, torch, C, P
feature_cache.SHARD_BYTES = 8 * P * C * 4
with FeatureWriter(FeatureStore(Path({directory!r}), torch.float32, C)) as writer:
    for number in range({first}, 10**9):
        writer.add(key(number), features(number), (1, 1))
        if number == {first} + 300:
            print("ready", flush=True)
"""


def test_two_writers_that_are_killed_leave_only_complete_features(store):
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER.format(tests=tests, directory=str(store.directory), first=first)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for first in (0, 10**8)
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    numbers = [first + i for first in (0, 10**8) for i in range(300)]
    found = [number for number, place in zip(numbers, store.find(keys(*numbers)), strict=True) if place["shard"] >= 0]
    assert len(found) > 550
    view = one_each(store, *found)
    for i, number in enumerate(found):
        assert torch.equal(view[i][0].features, features(number))
