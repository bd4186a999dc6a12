"""Streams of shards: every record once an epoch, disjoint over ranks and workers, and resumed at the record."""

import os
import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise

import pytest
import torch
from torch.utils.data import DataLoader
from toy_shards import (
    caption_files,
    caption_of,
    caption_row,
    image_bytes,
    tar_files,
    write_caption_tars,
    write_parquet,
)

from llava_lite.conversation import alpaca_prompt
from llava_lite.data.collator import DataCollatorForSupervisedDataset
from llava_lite.data.errors import DataError
from llava_lite.data.examples import ExampleMaker
from llava_lite.data.shards.order import StreamState, get_stream_parts
from llava_lite.data.shards.read import find_shards
from llava_lite.data.shards.stream import StreamBatch, StreamCollator, StreamDataset
from llava_lite.media.layout import ImageLayout
from llava_lite.media.preprocess import load_image_processor


@pytest.fixture(scope="session")
def maker(toy_tokenizer_for, toy_tower_dir):
    """Makes examples of captions, 16 features an image."""
    return ExampleMaker(
        toy_tokenizer_for("llama"), load_image_processor(str(toy_tower_dir())), "plain", ImageLayout(16), 256
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


@pytest.mark.parametrize(("num_shards", "num_streams"), [(1, 1), (7, 2), (3, 8), (4, 4), (1, 5), (100, 16)])
def test_streams_divide_every_epoch_without_overlap(num_shards, num_streams):
    for epoch in (0, 1):
        streams = [get_stream_parts(num_shards, num_streams, one, 5, epoch) for one in range(num_streams)]
        found = Counter(part for one in streams for part in one)
        num_parts = found and next(iter(found))[2]
        assert set(found.values()) == {1}
        assert {(shard, part) for shard, part, _ in found} == {
            (shard, part) for shard in range(num_shards) for part in range(num_parts)
        }
        assert all(streams)
        assert max(map(len, streams)) - min(map(len, streams)) <= 1


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
    num_workers = 0 if stream.streams_a_rank == 1 else stream.streams_a_rank
    collate = StreamCollator(DataCollatorForSupervisedDataset(0))
    return DataLoader(stream, batch_size=None, collate_fn=collate, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("at", [1, 4, 9, 13])
def test_a_run_resumes_with_the_next_micro_batch(at, num_workers, stream, tmp_path):
    options = {"num_workers": num_workers, "window": 3, "seed": 4}
    full = [batch["sample_ids"] for batch in islice(loader(stream(**options)), 16)]
    first = stream(**options)
    for batch in islice(loader(first), at):
        # Workers have read further; the run resumes after the batches that it used.
        first.note(batch["stream"])
    second = stream(**options)
    second.load_state_dict(first.state_dict())
    skipped, resumed = [], []
    for batch in islice(loader(second), 16):
        (resumed if batch else skipped).append(batch.get("sample_ids"))
    assert len(skipped) == at
    assert resumed == full[at:]


def test_a_resume_reads_no_shard_that_is_done(stream, tmp_path):
    full = stream(batch_size=1, window=2)
    batches = list(islice(full, 22))
    for batch in batches[:12]:
        full.note(batch)
    done = [shard for shard, _, _ in get_stream_parts(4, 1, 0, 0, 0)[: full.states[0].turn]]
    assert done
    for shard in done:
        full.shards[shard] = full.shards[shard]._replace(path="/nowhere")
    resumed = [batch for batch in islice(full, 22) if batch.examples]
    assert ids_of(resumed) == ids_of(batches[12:])


def test_the_state_of_a_stream_is_a_few_numbers(stream):
    streamed = stream()
    for batch in islice(streamed, 3):
        streamed.note(batch)
    state = streamed.state_dict()
    assert state["num_consumed"] == 3
    assert len(state["streams"]) == 1
    assert len(state["streams"][0]) == len(StreamState._fields)
    assert all(isinstance(number, int) for number in state["streams"][0])


def test_checkpoints_that_store_streams_as_lanes_are_read(stream):
    first, second = stream(batch_size=1), stream(batch_size=1)
    batches = list(islice(first, 9))
    for batch in batches[:5]:
        first.note(batch)
    state = first.state_dict()
    second.load_state_dict({"num_consumed": state["num_consumed"], "lanes": state["streams"]})
    assert ids_of(islice(second, 9)) == ids_of(batches[5:])


def broken(directory, counts=(6, 6), bad=(2,)):
    """Write shards in which some captions are missing."""
    directory.mkdir()
    number = 0
    for k, count in enumerate(counts):
        files = []
        for n in range(number, number + count):
            files += caption_files(n)[: 1 if n in bad else 2]
        tar_files(directory / f"{k:05d}.tar", files)
        number += count


def test_bad_record_stops_the_run_with_shard_and_key(tmp_path, stream):
    broken(tmp_path / "shards")
    with pytest.raises(DataError, match=r"record '000002' \(00000.tar\[2\]\): 1 images and no caption .*--bad_record"):
        ids_of(islice(stream(batch_size=1), 12))


def test_bad_records_are_left_out_reported_and_remembered(tmp_path, stream):
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
    with pytest.raises(DataError, match=r"11 of 1\d records of a stream cannot be used, the last: .*at most 1.00%"):
        ids_of(islice(stream(batch_size=1, bad_record="skip"), 30))


def test_a_stream_of_only_bad_records_ends_whatever_fraction_may_be_bad(tmp_path, stream):
    broken(tmp_path / "shards", counts=(30,), bad=range(30))
    with pytest.raises(DataError, match="1,000 of 1,000 records of a stream cannot be used"):
        next(iter(stream(bad_record="skip", max_bad_fraction=1.0)))


def test_broken_image_is_named(tmp_path, stream):
    (tmp_path / "shards").mkdir()
    tar_files(tmp_path / "shards" / "a.tar", [("x/7.jpg", b"no image"), ("x/7.txt", b"a cat")])
    with pytest.raises(DataError, match=r"record 'x/7' \(a.tar\[0\]\): cannot use its image: .* image file\. Mend"):
        next(iter(stream()))


def test_a_stream_without_records_is_an_error(tmp_path, stream):
    (tmp_path / "shards").mkdir()
    tar_files(tmp_path / "shards" / "a.tar", [])
    with pytest.raises(DataError, match="no record for a stream"):
        next(iter(stream()))


def test_a_run_resumes_at_the_end_of_a_shard_that_is_an_epoch(stream):
    full = stream([6], batch_size=2)
    batches = list(islice(full, 9))
    for batch in batches[:3]:
        full.note(batch)
    assert sorted(ids_of(batches[:3])) == [f"{n:06d}" for n in range(6)]
    resumed = stream(batch_size=2)
    resumed.load_state_dict(full.state_dict())
    assert ids_of(islice(resumed, 9)) == ids_of(batches[3:])


def test_an_empty_shard_among_others_stops_no_stream(tmp_path, stream):
    write_caption_tars(tmp_path / "shards", [5, 0])
    for rank in (0, 1):
        ids = ids_of(islice(stream(batch_size=1, rank=rank, num_ranks=2), 10))
        assert sorted(set(ids)) == [f"{n:06d}" for n in range(5)]


def test_packs_hold_as_many_examples_as_fit(stream):
    one_by_one = [batch.examples[0] for batch in islice(stream(batch_size=1), 60)]
    lengths = [len(example["input_ids"]) for example in one_by_one]
    packed = stream(pack_tokens=100)
    batches = list(islice(packed, 12))
    assert ids_of(batches) == [example["id"] for example in one_by_one][: len(ids_of(batches))]
    sizes = [sum(len(example["input_ids"]) for example in batch.examples) for batch in batches]
    assert max(sizes) <= 100
    # Each ends before an example that does not fit.
    ends = [sum(len(batch.examples) for batch in batches[: k + 1]) for k in range(len(batches))]
    assert all(size + lengths[end] > 100 for size, end in zip(sizes, ends, strict=True))
    for batch in batches[:5]:
        packed.note(batch)
    assert ids_of(batch for batch in islice(packed, 12) if batch.examples) == ids_of(batches[5:])
    with pytest.raises(DataError, match=r"has .* tokens but a pack holds 10"):
        next(iter(stream(pack_tokens=10)))


def test_settings_hold_what_decides_the_order(stream, tmp_path):
    base = stream().settings
    assert stream(num_workers=2).settings != base
    assert stream(window=9).settings != base
    assert stream(pack_tokens=90).settings != base
    write_parquet(tmp_path / "shards" / "more.parquet", [caption_row(50)])
    assert stream().settings != base


def test_a_batch_that_a_resume_skips_is_empty(stream):
    empty = StreamCollator(None)(StreamBatch([]))
    assert empty == {}


READ = r"""
import re, sys
from itertools import islice, pairwise
sys.path.insert(0, {tests!r})
from conftest import build_tokenizer
from llava_lite.data.examples import ExampleMaker
from llava_lite.data.shards.read import find_shards
from llava_lite.data.shards.stream import StreamDataset
from llava_lite.media.preprocess import load_image_processor
from llava_lite.media.layout import ImageLayout
maker = ExampleMaker(build_tokenizer("llama"), load_image_processor({tower!r}), "plain", ImageLayout(16), 256)
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


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_captions_of_shards_are_asked_for_as_those_of_a_caption_file(tmp_path, toy_tokenizer, toy_tower_dir, kind):
    """Stage 1 of LLaMA-Adapter and of Accessory from shards: the ids of the same caption in a csv."""
    if kind == "tar":
        write_caption_tars(tmp_path / "shards", (3,))
    else:
        (tmp_path / "shards").mkdir()
        write_parquet(tmp_path / "shards" / "0.parquet", [caption_row(number) for number in range(3)])
    processor = load_image_processor(str(toy_tower_dir()))
    for template, injection in (("alpaca", "adaption_prompt"), ("alpaca", "tokens"), ("caption", "adaption_prompt")):
        maker = ExampleMaker(toy_tokenizer, processor, template, ImageLayout(4), injection=injection)
        (example,) = next(iter(StreamDataset(find_shards(str(tmp_path / "shards")), maker, 1, window=1))).examples
        prompt = {"alpaca": alpaca_prompt("Generate caption of this image"), "caption": ""}[template]
        text_ids = [1, *toy_tokenizer(f"{prompt}{caption_of(0)}", add_special_tokens=False)["input_ids"], 2]
        places = int((example["input_ids"] == -200).sum())
        assert places == (4 if injection == "tokens" else 0)
        assert example["images"][0].shape == (3, 32, 32)
        if injection == "adaption_prompt":
            assert example["input_ids"].tolist() == text_ids
        supervised = [token for token in example["labels"].tolist() if token != -100]
        assert toy_tokenizer.decode(supervised) == f"{caption_of(0)}</s>"


def test_instructions_with_and_without_an_image_are_read_from_shards(tmp_path, toy_tokenizer, toy_tower_dir):
    rows = [{"instruction": "Translate.", "input": "rot", "output": "red", "image": None}]
    rows += [{"instruction": "What is it?", "input": "", "output": "one", "image": {"bytes": image_bytes(1)}}]
    (tmp_path / "shards").mkdir()
    write_parquet(tmp_path / "shards" / "0.parquet", rows)
    maker = ExampleMaker(toy_tokenizer, load_image_processor(str(toy_tower_dir())), "alpaca", ImageLayout(4))
    examples = next(iter(StreamDataset(find_shards(str(tmp_path / "shards")), maker, 2, window=1))).examples
    assert ["images" in example for example in examples] == [False, True]
    text = f"{alpaca_prompt('Translate.', 'rot')}red"
    assert examples[0]["input_ids"].tolist() == [1, *toy_tokenizer(text, add_special_tokens=False)["input_ids"], 2]


def test_a_stream_crops_by_record_and_epoch_and_resumes_with_the_same_crops(tmp_path, toy_tokenizer, toy_tower_dir):
    write_caption_tars(tmp_path / "shards", (3,))
    processor = load_image_processor(str(toy_tower_dir()))

    def opened(seed=3):
        maker = ExampleMaker(toy_tokenizer, processor, "caption", ImageLayout(4, aspect_ratio="random_crop"))
        maker.crop_randomly(seed)
        return StreamDataset(find_shards(str(tmp_path / "shards")), maker, 1, seed=5)

    def shown(stream, count):
        batches = iter(stream)
        return [next(batches) for _ in range(count)]

    full = shown(opened(), 6)
    resumed = opened()
    resumed.note(full[0])
    resumed.note(full[1])
    again = opened()
    again.load_state_dict(resumed.state_dict())
    rest = shown(again, 6)[2:]
    pixels = [batch.examples[0]["images"][0] for batch in full]
    assert all(torch.equal(one.examples[0]["images"][0], two) for one, two in zip(rest, pixels[2:], strict=True))
    by_id = {}
    for batch in full:
        by_id.setdefault(batch.examples[0]["id"], []).append(batch.examples[0]["images"][0])
    # Another epoch and another seed crop otherwise.
    assert any(not torch.equal(*pair) for pair in by_id.values())
    others = [batch.examples[0]["images"][0] for batch in shown(opened(seed=4), 6)]
    assert any(not torch.equal(*pair) for pair in zip(pixels, others, strict=True))
