"""Annotations read through the index are the records of the files, in every process, and stay so when files change."""

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llava_lite.data.errors import DataError
from llava_lite.data.index.annotations import open_annotations
from llava_lite.data.records.record import parse_record


def make_record(i, rng):
    turns = [
        ("human", rng.choice(["Hi \u00e9\U0001f600", 'He said "{x}"', "\\n"])),
        ("gpt", "Yes " * rng.randint(0, 9)),
    ]
    item = {"id": f"r{i}", "conversations": [{"from": role, "value": text} for role, text in turns]}
    if i % 3:
        item["image"] = [f"{i}_{k}.jpg" for k in range(i % 3)]
        item["conversations"][0]["value"] += "<image>" * (i % 3)
    return item


@pytest.fixture
def records():
    rng = random.Random(0)
    return [make_record(i, rng) for i in range(700)]


@pytest.fixture
def paths(tmp_path, records):
    """Two files that hold the records: JSON and JSON lines."""
    first, second = tmp_path / "a.json", tmp_path / "b.jsonl"
    first.write_text(json.dumps(records[:500], indent=1))
    second.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in records[500:]), encoding="utf-8")
    return [str(first), str(second)]


def expected(records, paths):
    places = [f"a.json[{i}]" for i in range(500)] + [f"b.jsonl[{i}]" for i in range(200)]
    return [parse_record(item, place, "images") for item, place in zip(records, places, strict=True)]


def test_records_are_those_of_the_files(records, paths):
    annotations = open_annotations(paths, "images")
    assert list(annotations) == expected(records, paths)
    assert annotations[-1] == annotations[699]
    assert annotations.num_images.tolist() == [i % 3 for i in range(700)]
    assert annotations.has_image.tolist() == [i % 3 > 0 for i in range(700)]
    with pytest.raises(IndexError):
        annotations[700]


def test_a_selection_is_part_of_the_records(records, paths):
    annotations = open_annotations(paths, "images")
    part = annotations.select(np.array([650, 3, 3, 499, 500])).select(np.array([0, 1, 3, 4]))
    assert list(part) == [annotations[i] for i in (650, 3, 499, 500)]
    assert part.num_images.tolist() == [i % 3 for i in (650, 3, 499, 500)]


def test_a_mixture_samples_each_file(tmp_path, records, paths):
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(
        f"datasets:\n  - {{json_path: {paths[0]}, sampling_strategy: 'end:2'}}\n"
        f"  - {{json_path: {paths[1]}, sampling_strategy: 'random:50%'}}\n"
    )
    annotations = open_annotations(str(mixture), "images")
    assert len(annotations) == 102
    assert [annotations[i].id for i in (0, 1)] == ["r498", "r499"]
    assert list(annotations) == list(open_annotations(str(mixture), "images"))


def test_pickled_annotations_are_paths_and_read_the_same(records, paths):
    annotations = open_annotations(paths, "images").select(np.arange(0, 700, 2))
    data = pickle.dumps(annotations)
    assert len(data) < 2000
    assert list(pickle.loads(data)) == list(annotations)


def test_the_index_is_made_once_and_again_after_a_change(paths, index_directory):
    def written():
        return {path: path.stat().st_mtime_ns for path in index_directory.rglob("spans.npy")}

    open_annotations(paths)
    first = written()
    assert first
    assert len(open_annotations(paths)) == 700
    assert written() == first
    with open(paths[1], "a") as file:
        file.write(
            '{"id": "new", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n'
        )
    assert open_annotations(paths)[700].id == "new"


def write_over(path, content):
    """Write into the file itself."""
    path.write_bytes(content)


def move_over(path, content):
    """Rename a new file to its name, as rsync does."""
    beside = path.with_name("beside")
    beside.write_bytes(content)
    os.replace(beside, path)


@pytest.mark.parametrize("replace", [write_over, move_over])
def test_a_file_replaced_by_one_of_the_same_size_and_time_is_read_again(paths, replace):
    path = Path(paths[0])
    before, known = open_annotations(paths), path.stat()
    assert before[1].id == "r1"
    # The first records begin elsewhere, so an old index would cut them apart.
    content = path.read_bytes().replace(b'"r0"', b'"first"', 1).replace(b'"r1"', b'""', 1)
    content = content.replace(b'"id": "r2"', b'"id":"r2"', 1)
    assert len(content) == known.st_size
    replace(path, content)
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert [record.id for record in open_annotations(paths)][:4] == ["first", "", "r2", "r3"]


def test_worker_processes_measure_the_same(paths, monkeypatch, tmp_path_factory):
    monkeypatch.setattr("llava_lite.data.index.tables.CHUNK_RECORDS", 64)
    monkeypatch.setattr("llava_lite.data.index.tables.POOL_START_S", -1.0)
    alone = open_annotations(paths).num_images
    monkeypatch.setenv("LLAVA_LITE_CACHE", str(tmp_path_factory.mktemp("other")))
    assert np.array_equal(open_annotations(paths, num_workers=2).num_images, alone)


def test_ranks_that_start_together_build_one_index(paths, index_directory):
    code = (
        "import sys\n"
        "from llava_lite.data.index import indexed_file\n"
        "from llava_lite.data.index.annotations import open_annotations\n"
        "scans = []\n"
        "def counting(scan):\n"
        "    return lambda path: scans.append(path) or scan(path)\n"
        "readers = indexed_file.READERS\n"
        "readers.update({k: r._replace(scan=counting(r.scan)) for k, r in readers.items()})\n"
        "annotations = open_annotations(sys.argv[1:])\n"
        "print(len(annotations), len(scans))\n"
    )
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, *paths], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    answers = [rank.communicate()[0].split() for rank in ranks]
    assert [length for length, _ in answers] == ["700"] * 3
    assert sum(int(scans) for _, scans in answers) == 2  # each of the two files once
    assert not list(index_directory.rglob("*.part"))


def test_one_wrong_record_does_not_hinder_the_others(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(
        '{"id": 1, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n'
        '{"id": 2, "conversations": [{"from": "human", "value": "a"\n'
        '{"id": 3, "conversations": []}\n'
    )
    annotations = open_annotations(str(path))
    assert annotations[0].id == "1"
    with pytest.raises(DataError, match=r"train.jsonl, line 2, column \d+: not JSON: Expecting ',' delimiter"):
        annotations[1]
    with pytest.raises(DataError, match="expected a list of turns"):
        annotations[2]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'[{"id": 1, "conversations": "\xff\xff"}]', "line 1, column 30: byte 0xff is not UTF-8"),
        (b'[{"id": 1,\n "conversations": 7 8}]', "line 2, column 21: not JSON"),
        (b'[{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}]", "nested too deeply"),
    ],
)
def test_a_record_that_is_not_json_is_named_with_line_and_column(tmp_path, data, words):
    path = tmp_path / "train.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match=words):
        open_annotations(str(path))[0]


def test_a_file_without_records_is_refused(tmp_path):
    path = tmp_path / "train.json"
    path.write_text("[]")
    with pytest.raises(DataError, match="holds no record"):
        open_annotations(str(path))


def test_an_index_directory_that_cannot_be_made_is_named(tmp_path, paths, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Set LLAVA_LITE_CACHE"):
        open_annotations(paths, cache_dir=str(tmp_path / "file" / "index"))


def test_a_forked_worker_reads_what_the_parent_reads(paths):
    annotations = open_annotations(paths)
    parent = [annotations[i].id for i in range(0, 700, 7)]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, json.dumps([annotations[i].id for i in range(0, 700, 7)]).encode())
        os._exit(0)
    os.close(writer)
    annotations[3]
    with os.fdopen(reader) as file:
        assert json.loads(file.read()) == parent
    os.waitpid(child, 0)


def test_processes_that_read_records_need_no_torch():
    # Its import alone is 150 MB in each of them.
    code = "import sys, llava_lite.data.index.annotations; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"
