"""The scanner against json itself, on complete and on broken files."""

import json
import random

import numpy as np
import pytest

from llava_lite.data.errors import DataError
from llava_lite.data.index import scan
from llava_lite.data.index.scan import scan_json, scan_lines

NASTY = ['plain "quoted"', "back\\slash\\", '\\"', "{[}]", "line\nbreak", "é中文😀", "", "\\\\", '","}],{']


def random_items(rng, num_items):
    def value(depth):
        kind = rng.randrange(6 if depth else 4)
        if kind == 4:
            return [value(depth - 1) for _ in range(rng.randrange(3))]
        if kind == 5:
            return {rng.choice(NASTY): value(depth - 1) for _ in range(rng.randrange(3))}
        return [rng.choice(NASTY), rng.random(), None, rng.choice(NASTY) * 3][kind]

    return [{"id": i, rng.choice(NASTY): value(3)} for i in range(num_items)]


def read(path, spans):
    data = path.read_bytes()
    return [json.loads(data[start:stop]) for start, stop in spans.tolist()]


@pytest.mark.parametrize("chunk_bytes", [1, 2, 7, 64, 1 << 20])
def test_spans_are_the_objects_that_json_reads(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(scan, "CHUNK_BYTES", chunk_bytes)
    rng, path = random.Random(chunk_bytes), tmp_path / "data.json"
    for _ in range(20):
        items = random_items(rng, rng.randrange(6))
        text = json.dumps(items, indent=rng.choice([None, 0, 2]), ensure_ascii=rng.random() < 0.5)
        path.write_bytes(rng.choice([b"", b"\xef\xbb\xbf"]) + text.encode() + rng.choice([b"", b"\n \n"]))
        assert read(path, scan_json(str(path))) == items


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 20])
def test_spans_are_the_lines_that_are_not_empty(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(scan, "CHUNK_BYTES", chunk_bytes)
    rng, path = random.Random(0), tmp_path / "data.jsonl"
    for _ in range(10):
        items = random_items(rng, rng.randrange(6))
        text = "".join(json.dumps(item) + rng.choice(["\n", "\r\n", "\n\n", "\n  \n"]) for item in items)
        path.write_bytes(rng.choice([b"", b"\xef\xbb\xbf"]) + text.rstrip().encode() + rng.choice([b"", b"\n"]))
        assert read(path, scan_lines(str(path))) == items


def test_json_lines_under_the_name_json_are_read(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('{"id": 1}\n{"id": 2}\n')
    assert read(path, scan_json(str(path))) == [{"id": 1}, {"id": 2}]


GOOD = '[{"id": "a", "v": "x"},\n {"id": "b", "v": "y"},\n {"id": "c", "v": "z"}]'


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (GOOD[:40], 2, "the file ends here"),
        (GOOD[:-1], 3, "does not close"),
        (GOOD.replace('"y"', '"y" stray"'), 2, "delimiter"),
        (GOOD.replace('"y"}', '"y"'), 3, "Expecting property name"),
        (GOOD.replace('"y"}', '"y"}}'), 2, "too early"),
        (GOOD.replace('"y"},', '"y"}'), 2, "one comma"),
        (GOOD.replace('"y"},', '"y"},,'), 2, "one comma"),
        (GOOD.replace('"y"},', '"y"}, 7,'), 2, "found ', 7,'"),
        (GOOD[:-1] + ",]", 3, "one comma"),
        (GOOD + " more", 3, "after the end"),
        ('{"train": [1]\n}', 1, "expected a list of records"),
        ("\n\n7", 3, "expected a list of records"),
        ("", 1, "found nothing"),
    ],
)
def test_a_broken_frame_is_named_with_file_line_and_reason(tmp_path, text, line, reason):
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        scan_json(str(path))
    assert f"{path}, line {line}," in str(error.value)
    assert reason in str(error.value)


def test_utf16_is_refused(tmp_path):
    path = tmp_path / "train.json"
    path.write_bytes(GOOD.encode("utf-16"))
    with pytest.raises(DataError, match="Save it as UTF-8"):
        scan_json(str(path))


def test_an_empty_list_has_no_span(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(" [ \n ] ")
    assert np.array_equal(scan_json(str(path)), np.zeros((0, 2)))


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    import tracemalloc

    monkeypatch.setattr(scan, "CHUNK_BYTES", 1 << 14)
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"id": i, "text": "x" * 1000} for i in range(4000)]))
    tracemalloc.start()
    scan_json(str(path))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 64 KiB of spans and some pieces of 16 KiB; the file has 4 MB.
    assert peak_bytes < 1_500_000
