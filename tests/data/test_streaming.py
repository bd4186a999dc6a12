"""Streams of shards: every record once an epoch, disjoint over ranks and workers, and resumed at the record."""

import os
import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise

import pytest
from torch.utils.data import DataLoader
from toy_shards import caption_files, caption_row, tar_files, write_caption_tars, write_parquet

from llava_lite.anyres import PictureLayout
from llava_lite.data.collator import DataCollatorForSupervisedDataset
from llava_lite.data.dataset import ExampleMaker
from llava_lite.data.scan import DataError
from llava_lite.data.shards import find_shards
from llava_lite.data.streaming import LaneState, StreamBatch, StreamCollator, StreamDataset, parts_of_lane
from llava_lite.pictures import load_image_processor


@pytest.fixture(scope="session")
def maker(toy_tokenizer_for, toy_tower_dir):
    """Makes examples of captions, 16 features a picture."""
    return ExampleMaker(
        toy_tokenizer_for("llama"), load_image_processor(str(toy_tower_dir())), "plain", PictureLayout(16), 256
    )


@pytest.fixture
def stream(tmp_path, maker):
    """Return a function: numbers of records by shard, and options -> a stream of them."""

    def make(counts=(5, 7, 4, 6), batch_size=2, **options):
        if not (tmp_path / "shards").exists():
            write_caption_tars(tmp_path / "shards", counts)
        return StreamDataset(find_shards(str(tmp_path / "shards")), maker, batch_size, **options)

    return make


def ids_of(batches):
    """Return the ids of the records of stream batches."""
    return [example["id"] for batch in batches for example in batch.examples]


def epoch_of(stream):
    """Return the ids that a stream of one worker reads in its first epoch."""
    batches = iter(stream)
    ids = []
    while (batch := next(batches)).state.epoch == 0:
        ids += ids_of([batch])
    return ids


@pytest.mark.parametrize(("num_shards", "num_lanes"), [(1, 1), (7, 2), (3, 8), (4, 4), (1, 5), (100, 16)])
def test_lanes_share_every_epoch_without_overlap(num_shards, num_lanes):
    for epoch in (0, 1):
        lanes = [parts_of_lane(num_shards, num_lanes, lane, 5, epoch) for lane in range(num_lanes)]
        found = Counter(part for lane in lanes for part in lane)
        num_parts = found and next(iter(found))[2]
        assert set(found.values()) == {1}
        assert {(shard, part) for shard, part, _ in found} == {
            (shard, part) for shard in range(num_shards) for part in range(num_parts)
        }
        assert all(lanes)
        assert max(map(len, lanes)) - min(map(len, lanes)) <= 1


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_each_record_comes_once_an_epoch_whatever_the_ranks(num_ranks, stream):
    ids = [
        record_id
        for rank in range(num_ranks)
        for record_id in epoch_of(stream(batch_size=1, rank=rank, num_ranks=num_ranks, window=3))
    ]
    assert sorted(ids) == [f"{n:06d}" for n in range(22)]


def test_order_is_one_of_seed_and_epoch(stream):
    first, again, other = (epoch_of(stream(batch_size=1, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    two_epochs = ids_of(islice(stream(batch_size=1, seed=1), 44))
    assert two_epochs[:22] == first
    assert sorted(two_epochs[22:]) == sorted(first)
    assert two_epochs[22:] != first
    # Within a shard too: the window is shuffled.
    assert sorted(first) != first
    plain = epoch_of(stream(batch_size=1, window=1))
    assert [int(b) - int(a) for a, b in pairwise(plain)].count(1) >= 18


def loader(stream):
    """Return the loader that a trainer makes of a stream."""
    num_workers = 0 if stream.lanes_a_rank == 1 else stream.lanes_a_rank
    collate = StreamCollator(DataCollatorForSupervisedDataset(0))
    return DataLoader(stream, batch_size=None, collate_fn=collate, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("at", [1, 4, 9, 13])
def test_a_run_goes_on_with_the_next_micro_batch(at, num_workers, stream, tmp_path):
    options = {"num_workers": num_workers, "window": 3, "seed": 4}
    whole = [batch["sample_ids"] for batch in islice(loader(stream(**options)), 16)]
    first = stream(**options)
    for batch in islice(loader(first), at):
        # A loader's workers are ahead of this; what counts is what the run has taken.
        first.note(batch["stream"])
    second = stream(**options)
    second.load_state_dict(first.state_dict())
    skipped, resumed = [], []
    for batch in islice(loader(second), 16):
        (resumed if batch else skipped).append(batch.get("sample_ids"))
    assert len(skipped) == at
    assert resumed == whole[at:]


def test_a_resume_reads_no_shard_that_is_done(stream, tmp_path):
    whole = stream(batch_size=1, window=2)
    batches = list(islice(whole, 22))
    for batch in batches[:12]:
        whole.note(batch)
    done = [shard for shard, _, _ in parts_of_lane(4, 1, 0, 0, 0)[: whole.states[0].turn]]
    assert done
    for shard in done:
        whole.shards[shard] = whole.shards[shard]._replace(path="/nowhere")
    resumed = [batch for batch in islice(whole, 22) if batch.examples]
    assert ids_of(resumed) == ids_of(batches[12:])


def test_what_a_lane_remembers_is_a_few_numbers(stream):
    streamed = stream()
    for batch in islice(streamed, 3):
        streamed.note(batch)
    state = streamed.state_dict()
    assert state["num_consumed"] == 3
    assert len(state["lanes"]) == 1
    assert len(state["lanes"][0]) == len(LaneState._fields)
    assert all(isinstance(number, int) for number in state["lanes"][0])


def broken(folder, counts=(6, 6), bad=(2,)):
    """Write shards in which some captions are missing."""
    folder.mkdir()
    number = 0
    for k, count in enumerate(counts):
        files = []
        for n in range(number, number + count):
            files += caption_files(n)[: 1 if n in bad else 2]
        tar_files(folder / f"{k:05d}.tar", files)
        number += count


def test_bad_record_stops_the_run_with_shard_and_key(tmp_path, stream):
    broken(tmp_path / "shards")
    with pytest.raises(DataError, match=r"record '000002' \(00000.tar\[2\]\): 1 images and no caption .*--bad_record"):
        ids_of(islice(stream(batch_size=1), 12))


def test_bad_records_are_left_out_told_and_remembered(tmp_path, stream):
    broken(tmp_path / "shards")
    (tmp_path / "shards" / "00001.tar").write_bytes((tmp_path / "shards" / "00001.tar").read_bytes()[:-11000])
    first = stream(batch_size=1, bad_record="skip", window=4)
    batches = list(islice(first, 30))
    left_out = [entry for batch in batches for entry in batch.left_out]
    assert {(entry["shard"].rsplit("/", 1)[-1], entry["key"]) for entry in left_out} == {
        ("00000.tar", "000002"),
        ("00001.tar", ""),
    }
    assert any("no header of a tar file (truncated header)" in entry["reason"] for entry in left_out)
    assert "000002" not in ids_of(batches)
    for batch in batches[:9]:
        first.note(batch)
    assert ids_of(batch for batch in islice(first, 30) if batch.examples) == ids_of(batches[9:])


def test_too_many_bad_records_stop_the_run(tmp_path, stream):
    broken(tmp_path / "shards", counts=(30,), bad=range(3, 30))
    with pytest.raises(DataError, match=r"11 of 1\d records of a lane cannot be used, the last: .*at most 1.00%"):
        ids_of(islice(stream(batch_size=1, bad_record="skip"), 30))


def test_a_stream_of_bad_records_alone_ends_whatever_share_may_be_bad(tmp_path, stream):
    broken(tmp_path / "shards", counts=(30,), bad=range(30))
    with pytest.raises(DataError, match="1,000 of 1,000 records of a lane cannot be used"):
        next(iter(stream(bad_record="skip", max_bad_share=1.0)))


def test_broken_picture_is_named(tmp_path, stream):
    (tmp_path / "shards").mkdir()
    tar_files(tmp_path / "shards" / "a.tar", [("x/7.jpg", b"no picture"), ("x/7.txt", b"a cat")])
    with pytest.raises(DataError, match=r"record 'x/7' \(a.tar\[0\]\): cannot use its picture: .* image file\. Mend"):
        next(iter(stream()))


def test_lane_without_records_is_refused(tmp_path, stream):
    (tmp_path / "shards").mkdir()
    tar_files(tmp_path / "shards" / "a.tar", [])
    with pytest.raises(DataError, match="no record for a lane"):
        next(iter(stream()))


def test_a_run_goes_on_at_the_end_of_a_shard_that_is_an_epoch(stream):
    whole = stream([6], batch_size=2)
    batches = list(islice(whole, 9))
    for batch in batches[:3]:
        whole.note(batch)
    assert sorted(ids_of(batches[:3])) == [f"{n:06d}" for n in range(6)]
    resumed = stream(batch_size=2)
    resumed.load_state_dict(whole.state_dict())
    assert ids_of(islice(resumed, 9)) == ids_of(batches[3:])


def test_an_empty_shard_among_others_stops_no_lane(tmp_path, stream):
    write_caption_tars(tmp_path / "shards", [5, 0])
    for rank in (0, 1):
        ids = ids_of(islice(stream(batch_size=1, rank=rank, num_ranks=2), 10))
        assert sorted(set(ids)) == [f"{n:06d}" for n in range(5)]


def test_packs_hold_as_many_examples_as_have_room(stream):
    one_by_one = [batch.examples[0] for batch in islice(stream(batch_size=1), 60)]
    lengths = [len(example["input_ids"]) for example in one_by_one]
    packed = stream(pack_tokens=100)
    batches = list(islice(packed, 12))
    assert ids_of(batches) == [example["id"] for example in one_by_one][: len(ids_of(batches))]
    sizes = [sum(len(example["input_ids"]) for example in batch.examples) for batch in batches]
    assert max(sizes) <= 100
    # Each is closed by an example that had no room.
    ends = [sum(len(batch.examples) for batch in batches[: k + 1]) for k in range(len(batches))]
    assert all(size + lengths[end] > 100 for size, end in zip(sizes, ends, strict=True))
    for batch in batches[:5]:
        packed.note(batch)
    assert ids_of(batch for batch in islice(packed, 12) if batch.examples) == ids_of(batches[5:])
    with pytest.raises(DataError, match=r"has .* tokens, a pack 10"):
        next(iter(stream(pack_tokens=10)))


def test_settings_tell_what_decides_the_order(stream, tmp_path):
    base = stream().settings
    assert stream(num_workers=2).settings != base
    assert stream(window=9).settings != base
    assert stream(pack_tokens=90).settings != base
    write_parquet(tmp_path / "shards" / "more.parquet", [caption_row(50)])
    assert stream().settings != base


def test_a_batch_that_was_taken_before_costs_nothing_but_a_place_in_the_queue(stream):
    empty = StreamCollator(None)(StreamBatch([]))
    assert empty == {}


READ = r"""
import re, sys
from itertools import islice, pairwise
sys.path.insert(0, {tests!r})
from conftest import build_tokenizer
from llava_lite.data.dataset import ExampleMaker
from llava_lite.data.shards import find_shards
from llava_lite.data.streaming import StreamDataset
from llava_lite.pictures import load_image_processor
from llava_lite.anyres import PictureLayout
maker = ExampleMaker(build_tokenizer("llama"), load_image_processor({tower!r}), "plain", PictureLayout(16), 256)
stream = StreamDataset(find_shards({pattern!r}), maker, 4, window=64)
for batch in islice(stream, {num_batches}):
    stream.note(batch)
# Not ru_maxrss, which a process inherits from the one that started it.
print(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
def test_memory_of_a_rank_does_not_grow_with_the_shards(tmp_path, toy_tower_dir, request):
    peaks = []
    write_caption_tars(tmp_path / "few", [100] * 4)
    (tmp_path / "many").mkdir()
    for k in range(40):
        # The same texts, since the tokenizer remembers words: 7 MB, until it knows 10,000.
        os.link(tmp_path / "few" / f"{k % 4:05d}.tar", tmp_path / "many" / f"{k:05d}.tar")
    for name, count in (("few", 4), ("many", 40)):
        code = READ.format(
            tests=str(request.config.rootpath / "tests"),
            tower=str(toy_tower_dir()),
            pattern=str(tmp_path / name),
            num_batches=count * 25,
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    print(f"peak RSS, MB, of one pass over 4 and 40 shards of 100 captions: {peaks[0]:.1f} and {peaks[1]:.1f}")
    # 3,600 captions more in records of a few kilobytes each would be tens of megabytes.
    assert peaks[1] - peaks[0] < 4
