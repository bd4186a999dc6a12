"""What a check finds before step 1, and what each policy makes of it."""

import json

import numpy as np
import pytest

from llava_lite.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_lite.data.check.check import check_annotations
from llava_lite.data.encode import RecordEncoder
from llava_lite.data.errors import DataError
from llava_lite.data.index.annotations import open_annotations
from llava_lite.media.layout import ImageLayout

P = 16  # features of an image


@pytest.fixture
def encoder(toy_tokenizer):
    return RecordEncoder(toy_tokenizer, "v1")


@pytest.fixture
def check(encoder):
    def run(path, directory, **options):
        options = {"max_length": 2048} | options
        return check_annotations(open_annotations(path, directory), encoder, ImageLayout(P), **options)

    return run


def test_public_oddities_are_named_with_record_file_and_reason(oddities, check):
    path, directory, bad = oddities
    with pytest.raises(DataError) as error:
        check(path, directory)
    message = str(error.value)
    assert message.startswith("2 of 13 records cannot be used (1 image, 1 length):")
    assert (
        f"record {bad[0]!r} (train.json[3]): cannot use the image '{directory}/ocr_vqa/images/missing.jpg'" in message
    )
    assert f"record {bad[1]!r} (train.json[7]): no supervised token: the answer begins at token" in message
    assert "--bad_record skip" in message


def test_skip_leaves_them_out_and_keeps_a_skipped_log(oddities, check, tmp_path):
    path, directory, bad = oddities
    skipped_log = tmp_path / "out" / "skipped_log.jsonl"
    report = check(path, directory, bad_record="skip", max_bad_fraction=0.2, skipped_log_path=skipped_log)
    assert [record.id for record in report.annotations] == [
        r.id for r in open_annotations(path, directory) if r.id not in bad
    ]
    lines = [json.loads(line) for line in skipped_log.read_text().splitlines()]
    assert [(line["id"], line["position"], line["kind"]) for line in lines] == [
        ("ocr missing", 3, "image"),
        ("long question", 7, "length"),
    ]
    assert (report.num_records, report.num_with_image, report.num_other_suffix, report.num_truncated) == (
        11,
        8,
        2,
        1,
    )
    assert "11 records: 8 with images, 3 text only" in report.summary()
    assert "2 records left out (1 image, 1 length)" in report.summary()
    # A second start, a second rank: the same bytes, the same decision.
    other = tmp_path / "other.jsonl"
    again = check(path, directory, bad_record="skip", max_bad_fraction=0.2, skipped_log_path=other)
    assert other.read_bytes() == skipped_log.read_bytes()
    assert again.digest == report.digest


def test_skip_refuses_to_lose_more_than_its_fraction(oddities, check):
    path, directory, _ = oddities
    with pytest.raises(DataError, match=r"That is 15.38%; --bad_record skip leaves out at most 1.00%"):
        check(path, directory, bad_record="skip")
    with pytest.raises(ValueError, match="unknown bad_record 'ignore'; known: raise, skip"):
        check(path, directory, bad_record="ignore")


def test_a_mended_image_is_seen_at_the_next_start(oddities, check):
    from PIL import Image

    path, directory, _ = oddities
    with pytest.raises(DataError, match="1 image"):
        check(path, directory)
    Image.new("RGB", (5, 6)).save(f"{directory}/ocr_vqa/images/missing.jpg")
    report = check(path, directory, bad_record="skip", max_bad_fraction=0.1)
    assert [entry.id for entry in report.bad] == ["long question"]


def test_a_second_start_looks_at_no_image_again(write_json, check, tmp_path, monkeypatch):
    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.new("RGB", (5, 6)).save(tmp_path / "images" / "a.png")
    turns = [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "Yes."}]
    path = write_json(
        [
            {"id": 1, "image": ["a.png", "a.png"], "conversations": turns},
            {"id": 2, "conversations": [{**turns[0], "value": "Hi"}, turns[1]]},
        ]
    )
    check(path, str(tmp_path / "images"))
    monkeypatch.setattr(Image, "open", None)
    report = check(path, str(tmp_path / "images"))
    assert report.annotations.image_sizes.tolist() == [[5, 6], [5, 6]]
    assert report.annotations.select([1, 0]).image_sizes.tolist() == [[5, 6], [5, 6]]
    # Another image directory is checked again.
    with pytest.raises(DataError, match="there is no such file"):
        check(path, str(tmp_path))


def test_every_kind_of_bad_record_is_found_at_once_and_the_first_twenty_are_named(write_json, check):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]
    records = [{"id": i, "conversations": turns} for i in range(30)]
    records[3] = {"id": 3, "conversations": "none"}
    records[4] = {"id": 4, "conversations": turns[:1]}
    records += [
        {"id": i, "image": f"{i}.jpg", "conversations": [{**turns[0], "value": "<image>"}, turns[1]]}
        for i in range(40)
    ]
    with pytest.raises(DataError) as error:
        check(write_json(records), None)
    lines = str(error.value).splitlines()
    assert lines[0] == "42 of 70 records cannot be used (40 image, 1 length, 1 record):"
    assert len(lines) == 1 + 20 + 2
    assert "'conversations' is str 'none'" in lines[1]
    assert "record '4' (train.json[4]): no supervised token: none" in lines[2]
    assert "... and 22 more" in lines[-2]


def test_record_that_is_no_json_is_named_by_its_place(write_json, check):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]
    path = write_json([{"id": 1, "conversations": turns}, {"id": 2, "conversations": turns}])
    with open(path) as file:
        text = file.read()
    with open(path, "w") as file:
        file.write(text.replace('"from":', '"from"', 1))
    reason = r"\n  train.json\[0\]: .*train.json, line \d+, column \d+: not JSON: Expecting ':'"
    with pytest.raises(DataError, match=reason):
        check(path, None)


@pytest.mark.parametrize("max_length", [20, 60, 100, 140, 200, 400])
def test_lengths_and_truncation_agree_with_the_tokens_themselves(write_json, encoder, tmp_path, max_length):
    from PIL import Image

    Image.new("RGB", (5, 6)).save(tmp_path / "a.png")
    records = []
    for i in range(40):
        count = i % 4
        turns = [
            {"from": "human", "value": "<image> and " * count + "What? " * (i % 7)},
            {"from": "gpt", "value": "So " * i},
        ]
        more = [{"from": "human", "value": "More? "}, {"from": "gpt", "value": "No. " * (i % 5)}]
        records.append({"id": i, "conversations": turns + more} | ({"image": ["a.png"] * count} if count else {}))
    annotations = open_annotations(write_json(records), str(tmp_path))
    bad = set()
    for i, record in enumerate(annotations):
        ids, labels = encoder(record)
        long_ids = [t for t in ids for _ in range(P if t == IMAGE_TOKEN_INDEX else 1)]
        long_labels = [y for t, y in zip(ids, labels, strict=True) for _ in range(P if t == IMAGE_TOKEN_INDEX else 1)]
        kept = [y for y in long_labels[:max_length] if y != IGNORE_INDEX]
        if not kept or IMAGE_TOKEN_INDEX in long_ids[max_length:]:
            bad.add(i)
        records[i] |= {"length": len(long_ids), "supervised": sum(y != IGNORE_INDEX for y in labels)}
    report = check_annotations(
        annotations, encoder, ImageLayout(P), max_length, bad_record="skip", max_bad_fraction=1.0
    )
    assert {int(entry.id) for entry in report.bad} == bad
    assert annotations.token_lengths.tolist() == [item["length"] for item in records]
    left = [records[i]["length"] for i in range(40) if i not in bad]
    assert report.num_tokens == sum(min(length, max_length) for length in left)
    assert report.num_truncated == sum(length > max_length for length in left)
    supervised = sum(records[i]["supervised"] for i in range(40) if i not in bad)
    assert report.supervised_fraction == supervised / max(sum(left), 1)


def test_token_counts_are_kept_apart_for_each_tokenizer_and_template(write_json, toy_tokenizer_for):
    turns = [{"from": "human", "value": "How many circles?"}, {"from": "gpt", "value": "Three blue circles."}]
    annotations = open_annotations(write_json([{"id": 1, "conversations": turns}]))
    seen = {}
    for kind, template in (("llama", "v1"), ("llama", "plain"), ("gpt2", "v1"), ("qwen", "chat")):
        encoder = RecordEncoder(toy_tokenizer_for(kind), template)
        assert encoder.fingerprint == RecordEncoder(toy_tokenizer_for(kind), template).fingerprint
        annotations.count_tokens(encoder, ImageLayout(P))
        assert annotations.token_lengths.tolist() == [len(encoder(annotations[0])[0])]
        seen[encoder.fingerprint] = annotations.token_lengths[0]
    assert len(seen) == 4


def test_counting_stops_and_resumes_where_it_was(write_json, encoder, monkeypatch):
    monkeypatch.setattr("llava_lite.data.index.tables.CHUNK_RECORDS", 4)
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]
    annotations = open_annotations(write_json([{"id": i, "conversations": turns} for i in range(20)]))
    seen = []

    class Stopping(RecordEncoder):
        def measure(self, record):
            if len(seen) == 10:
                raise KeyboardInterrupt
            seen.append(record.id)
            return super().measure(record)

    with pytest.raises(KeyboardInterrupt):
        annotations.count_tokens(Stopping(encoder.tokenizer, "v1"), ImageLayout(P))
    assert len(np.flatnonzero(annotations.token_facts().text_len > 0)) == 8
    seen.clear()
    seen.append("one")
    with pytest.raises(KeyboardInterrupt):
        annotations.count_tokens(Stopping(encoder.tokenizer, "v1"), ImageLayout(P))
    assert seen[1] == "8"


def test_worker_processes_count_the_same_tokens(write_json, encoder, monkeypatch, tmp_path_factory):
    monkeypatch.setattr("llava_lite.data.index.tables.CHUNK_RECORDS", 8)
    # What a pool saves is always more than its start costs.
    monkeypatch.setattr("llava_lite.data.index.tables.POOL_START_S", -1.0)
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]
    broken = {"id": 5, "conversations": turns[1:]}
    path = write_json([{"id": i, "conversations": turns * (1 + i % 3)} for i in range(40)] + [broken])
    alone = open_annotations(path)
    alone.count_tokens(encoder, ImageLayout(P))
    monkeypatch.setenv("LLAVA_LITE_CACHE", str(tmp_path_factory.mktemp("other")))
    spread = open_annotations(path)
    problems = spread.count_tokens(encoder, ImageLayout(P), num_workers=2)
    assert np.array_equal(spread.token_facts(), alone.token_facts())
    assert list(problems) == [40]
    assert "no turn remains" in str(problems[40])
