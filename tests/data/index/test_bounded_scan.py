"""Annotation files that are no annotations: file, place and reason within seconds, and no more memory than chunks."""

import os
import random
import subprocess
import sys

import pytest

from llava_lite.data.errors import DataError
from llava_lite.data.index import scan
from llava_lite.data.index.annotations import open_annotations

RECORD = '{"id":"7","conversations":[{"from":"human","value":"q"},{"from":"gpt","value":"a"}]}'
# name: (start, what is repeated, how often, end, message); the sizes are those of a tenth, see the slow test.
FILES = {
    "bracket.json": ("", "[", 20_000_000, "", r"line 1, column 1000001: lists and objects are nested more than"),
    "brace.json": ("", "{", 20_000_000, "", r"line 1, column 1: found '\{', expected a list"),
    "quote.json": ("", '"', 20_000_000, "", r"line 1, column 1: found '\"', expected a list"),
    "space.json": ("", " ", 20_000_000, "", r"line 1, column 20000001: found nothing"),
    "backslash.json": ('[{"a":"', "\\", 20_000_001, "", r"line 1, column 7: not JSON: Unterminated string"),
    "comma.json": ("[", ",", 20_000_000, "", r"the list of records does not close"),
    "empty.json": ("[", "{},", 6_000_000, "{}]", r"line 1, column 2: 2,796,203 records from here have 3 bytes"),
    "empty.jsonl": ("", "{}\n", 6_000_000, "", r"line 1, column 1: 2,796,202 records from here have 3 bytes"),
    "newline.jsonl": ("", "\n", 20_000_000, "", r"line 1, column 1: 8,388,608 records from here have 1 bytes"),
}
RECORDS = {
    "letter.jsonl": ("a" * 2_000_000 + "\n", r"line 1, column 1: not JSON: Expecting value"),
    "bracket.jsonl": ("[" * 2_000_000 + "\n", r"line 1, column 1: not JSON: lists and objects are nested too deeply"),
    "deep.json": (
        f'[{RECORD[:-1]},"x":{"[" * 100_000}{"]" * 100_000}}}]',
        r"column 2: not JSON: .* nested too deeply",
    ),
    "objects.jsonl": (
        RECORD[:-1] + ',"x":' + '{"a":' * 100_000 + "1" + "}" * 100_001,
        r"line 1, .*: not JSON: .* nested too deeply",
    ),
    "digits.jsonl": (f'{RECORD[:-1]},"x":{"9" * 100_000}}}', r"line 1, .*: not JSON: .*100000 digits"),
    "nan.jsonl": ('{"id":NaN,"conversations":NaN}', r"nan\.jsonl\[0\]: 'id' is float nan"),
    "infinite.jsonl": ('{"id":1e400,"conversations":[1,2]}', r"infinite\.jsonl\[0\]: 'id' is float inf"),
    "number.jsonl": ("5\n", r"number\.jsonl\[0\]"),
}


def write(path, start, repeated, times, end):
    with path.open("w") as file:
        file.write(start)
        for _ in range(100):
            file.write(repeated * (times // 100))
        file.write(repeated * (times % 100) + end)
    return path


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_none_ends_with_place_and_reason(name, tmp_path):
    *parts, message = FILES[name]
    path = write(tmp_path / name, *parts)
    with pytest.raises(DataError, match=message):
        open_annotations(str(path), cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_is_none_is_one_bad_record_with_place_and_reason(name, tmp_path):
    content, message = RECORDS[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        open_annotations(str(tmp_path / name), cache_dir=str(tmp_path / "cache"))[0]


def test_one_deep_record_leaves_the_others(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{RECORD}\n{'[' * 100_000}\n{RECORD}\n")
    found = open_annotations(str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert [found[0].id, found[2].id] == ["7", "7"]
    with pytest.raises(DataError, match="line 2, column 1"):
        found[1]


def test_many_blank_lines_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"\n\n{RECORD}\n \t\n\n{RECORD}" + "\n" * 1000)
    assert len(scan.scan_lines(str(tmp_path / "a.jsonl"))) == 2


@pytest.mark.parametrize("chunk_bytes", range(1, 9))
def test_backslashes_at_the_ends_of_chunks_escape_what_follows(monkeypatch, tmp_path, chunk_bytes):
    import json

    draw = random.Random(chunk_bytes)
    texts = ["".join(draw.choices('\\"{}[],a', k=draw.randrange(30))) for _ in range(40)]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    monkeypatch.setattr(scan, "CHUNK_BYTES", chunk_bytes)
    data = (tmp_path / "a.json").read_bytes()
    spans = scan.scan_json(str(tmp_path / "a.json")).tolist()
    assert [json.loads(data[start:stop])["text"] for start, stop in spans] == texts


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FILES, "one_record.jsonl"])
def test_ten_times_as_much_takes_no_more_memory(name, tmp_path):
    if name in FILES:
        start, repeated, times, end, _ = FILES[name]
        path = write(tmp_path / name, start, repeated, 10 * times, end)
    else:
        path = write(tmp_path / name, RECORD[:-3] + '"},{"from":"human","value":"', "x", 150_000_000, '"}]}')
    program = (
        "import resource, sys\n"
        "from llava_lite.data.errors import DataError\n"
        "from llava_lite.data.index.annotations import open_annotations\n"
        "try:\n    open_annotations(sys.argv[1], cache_dir=sys.argv[2])[0]\n"
        "except DataError as error:\n    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    command = [sys.executable, "-c", program, str(path), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=dict(os.environ))
    # KiB: the import has 60,000, a chunk's arrays 200,000, a record of 150 MB three times its size.
    assert int(done.stdout.splitlines()[-1]) < 1_000_000
