"""Shards: which files, what a record is, from any place on; `datasets` reads the same tar and parquet files."""

import io
import json
import os

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from huggingface_hub import HfFileSystem
from PIL import Image
from toy_shards import (
    caption_files,
    caption_of,
    caption_row,
    conversation_json,
    conversation_of,
    conversation_row,
    image_bytes,
    tar_files,
    write_caption_tars,
    write_parquet,
)

from llava_lite.data.errors import DataError
from llava_lite.data.index.sources import is_shards, open_sources
from llava_lite.data.shards.files import Place
from llava_lite.data.shards.read import find_shards, parse_shard_record, read_shard

LONG = "directory/" * 20 + "a_key_longer_than_the_hundred_bytes_that_a_plain_header_has_room_for"


def records_of(shard, place=Place(), part=0, num_parts=1):  # noqa: B008 - a tuple does not change
    """Return the parsed records of a shard."""
    return [parse_shard_record(shard, raw) for raw in read_shard(shard, place, part, num_parts)]


def only(path):
    """Return the one shard at a path."""
    (shard,) = find_shards(str(path))
    return shard


def test_captions_of_a_tar_are_those_that_datasets_reads(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pattern = write_caption_tars(tmp_path / "shards", [3, 4])
    ours = [found for shard in find_shards(pattern) for found in records_of(shard)]
    theirs = datasets.load_dataset("webdataset", data_files=pattern, split="train", streaming=True)
    theirs = list(theirs.cast_column("png", datasets.Image(decode=False)))
    assert len(ours) == len(theirs) == 7
    for (record, images), item in zip(ours, theirs, strict=True):
        assert record.turns == (("human", "<image>"), ("gpt", item["txt"].strip()))
        assert record.id == item["__key__"].rsplit("/", 1)[-1]
        assert images == (item["png"]["bytes"],)


def test_rows_of_parquet_are_those_that_datasets_reads(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = write_parquet(tmp_path / "a.parquet", [conversation_row(n) for n in range(7)], row_group_size=3)
    ours = records_of(only(path))
    theirs = list(datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True))
    assert [record.id for record, _ in ours] == [item["id"] for item in theirs]
    for (record, images), item in zip(ours, theirs, strict=True):
        assert record.turns == tuple((turn["from"], turn["value"]) for turn in item["conversations"])
        assert images == (item["image"]["bytes"],)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_reading_resumes_at_any_place_without_what_stands_before(kind, tmp_path):
    if kind == "tar":
        path = tar_files(tmp_path / "a.tar", [file for n in range(9) for file in caption_files(n)])
    else:
        path = write_parquet(tmp_path / "a.parquet", [caption_row(n) for n in range(9)], row_group_size=4)
    shard = only(path)
    full = list(read_shard(shard))
    assert [raw.number for raw in full] == list(range(9))
    for k, raw in enumerate(full):
        assert list(read_shard(shard, raw.after)) == full[k + 1 :]
    if kind == "tar":
        # Not a byte of the records before is read: they may be anything.
        at = full[4].after.offset
        path.write_bytes(b"\xff" * at + path.read_bytes()[at:])
        assert list(read_shard(shard, full[4].after)) == full[5:]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_parts_of_a_shard_are_disjoint_and_complete(kind, tmp_path):
    if kind == "tar":
        path = tar_files(tmp_path / "a.tar", [file for n in range(10) for file in caption_files(n)])
    else:
        path = write_parquet(tmp_path / "a.parquet", [caption_row(n) for n in range(10)], row_group_size=4)
    shard = only(path)
    parts = [list(read_shard(shard, part=part, num_parts=3)) for part in range(3)]
    assert [[raw.number for raw in part] for part in parts] == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert sorted((raw for part in parts for raw in part), key=lambda raw: raw.number) == list(read_shard(shard))
    assert list(read_shard(shard, parts[1][0].after, 1, 3)) == parts[1][1:]


def test_conversations_lie_in_json_beside_their_images(tmp_path):
    two = json.dumps({"conversations": conversation_of(1, num_images=2)}).encode()
    files = [("0.jpg", b"a"), ("0.json", conversation_json(0)), ("1.0.jpg", b"b"), ("1.1.jpg", b"c"), ("1.json", two)]
    files += [
        ("2.json", json.dumps({"conversations": [*conversation_of(2, num_images=0)]}).encode()),
        ("._junk", b"x"),
    ]
    first, second, third = records_of(only(tar_files(tmp_path / "a.tar", files)))
    assert (first.record.id, first.images, first.record.where) == ("000000", (b"a",), "a.tar[0]")
    assert (second.record.id, second.images) == ("1", (b"b", b"c"))
    assert second.record.images == ("1.0.jpg", "1.1.jpg")
    assert (third.record.images, third.images) == ((), ())


@pytest.mark.parametrize("named", [None, "elsewhere"])
def test_images_of_a_record_are_in_the_order_of_their_numbers(named, tmp_path):
    output = {"image": [f"{named}/{k}.jpg" for k in range(12)]} if named else {}
    item = {"conversations": conversation_of(1, num_images=12)} | output
    files = [(f"r.{k}.jpg", b"%d" % k) for k in (*range(10, 12), *range(10))] + [("r.json", json.dumps(item).encode())]
    ((record, images),) = records_of(only(tar_files(tmp_path / "a.tar", files)))
    assert images == tuple(b"%d" % k for k in range(12))
    assert record.images == tuple(f"r.{k}.jpg" for k in range(12))


def test_images_of_a_record_are_in_the_order_that_it_says(tmp_path):
    item = {"conversations": conversation_of(1, num_images=2), "image": ["r.Right.jpg", "r.left.jpg"]}
    files = [("r.left.jpg", b"left"), ("r.Right.jpg", b"right"), ("r.json", json.dumps(item).encode())]
    ((_, images),) = records_of(only(tar_files(tmp_path / "a.tar", files)))
    assert images == (b"right", b"left")


def test_captions_lie_in_json_too_and_keys_may_be_long(tmp_path):
    files = [(f"{LONG}.jpg", b"p"), (f"{LONG}.json", json.dumps({"caption": " a cat ", "url": "x"}).encode())]
    shard = only(tar_files(tmp_path / "a.tar", files * 1))
    ((record, images),) = records_of(shard)
    assert (record.id, record.turns[1], images) == (LONG, ("gpt", "a cat"), (b"p",))


def test_rows_hold_conversations_in_several_shapes(tmp_path):
    turns = conversation_of(5)
    as_lists = {"from": [turn["from"] for turn in turns], "value": [turn["value"] for turn in turns]}
    for k, conversation in enumerate((turns, as_lists, json.dumps(turns))):
        row = {"images": [image_bytes(1)], "conversations": conversation}
        ((record, images),) = records_of(only(write_parquet(tmp_path / f"{k}.parquet", [row])))
        assert record.turns == (("human", turns[0]["value"]), ("gpt", turns[1]["value"]))
        assert Image.open(io.BytesIO(images[0])).size == (41, 40)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("7.jpg", b"a")], r"record '7' \(a.tar\[0\]\): 1 images and no caption \(found: jpg\)"),
        ([("7.txt", b"a cat")], "0 images and a caption"),
        ([("7.jpg", b"a"), ("7.txt", b" ")], "the caption is empty"),
        ([("7.jpg", b"a"), ("7.txt", b"\xff")], "the txt is not UTF-8"),
        ([("7.jpg", b"a"), ("7.json", b"{")], "not JSON"),
        ([("7.jpg", b"a"), ("7.json", b"[]")], "the JSON holds list, expected dict"),
        (
            [("7.json", json.dumps({"image": "a.jpg", "conversations": conversation_of(1)}).encode())],
            "the shard has no file",
        ),
        (
            [("7.jpg", b"a"), ("7.json", json.dumps({"conversations": conversation_of(1, 2)}).encode())],
            "2 <image> place",
        ),
    ],
)
def test_broken_record_is_named_by_shard_and_key(files, message, tmp_path):
    shard = only(tar_files(tmp_path / "a.tar", [*files, *caption_files(8)]))
    first, second = read_shard(shard)
    with pytest.raises(DataError, match=message):
        parse_shard_record(shard, first)
    assert parse_shard_record(shard, second).record.turns[1] == ("gpt", caption_of(8))


@pytest.mark.parametrize(
    ("more", "message"), [(0, "cut short"), (100, "byte"), (520, "ends inside '000002.png': 8 of")]
)
def test_a_shard_that_is_cut_short_gives_what_it_has_and_says_so(more, message, tmp_path):
    path = tar_files(tmp_path / "a.tar", [file for n in range(3) for file in caption_files(n)])
    third = list(read_shard(only(path)))[1].after.offset
    # In front of the third record, inside its header, inside its image.
    path.write_bytes(path.read_bytes()[: third + more])
    *full, last = read_shard(only(path))
    # The second is known to be complete where the third begins.
    assert [raw.key for raw in full] == ["000000", "000001"][: 2 if more == 520 else 1]
    with pytest.raises(DataError, match=message):
        parse_shard_record(only(path), last)


@pytest.mark.parametrize("num_parts", [1, 2])
def test_a_file_too_large_costs_its_own_record_only(num_parts, tmp_path, monkeypatch):
    monkeypatch.setattr("llava_lite.data.shards.files.MAX_MEMBER_BYTES", 2000)
    files = [("0.png", b"x" * 2001), ("0.txt", b"a cat"), *(file for n in range(1, 4) for file in caption_files(n))]
    shard = only(tar_files(tmp_path / "a.tar", files))
    found = [raw for part in range(num_parts) for raw in read_shard(shard, part=part, num_parts=num_parts)]
    good = sorted(raw.key for raw in found if raw.error is None)
    assert good == ["000001", "000002", "000003"]
    (bad,) = [raw for raw in found if raw.error is not None]
    with pytest.raises(DataError, match=r"a\.tar\[0\]: '0\.png' has 2,001 bytes"):
        parse_shard_record(shard, bad)


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + b"\xff" * 11])
def test_a_size_that_cannot_be_ends_the_shard_with_a_reason(size, tmp_path):
    path = tar_files(tmp_path / "a.tar", [file for n in range(2) for file in caption_files(n)])
    data = bytearray(path.read_bytes())
    data[124:136] = size
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    *_, last = read_shard(only(path))
    with pytest.raises(DataError, match=r"a\.tar"):
        parse_shard_record(only(path), last)


def test_a_text_that_is_not_utf_8_costs_its_own_row_only(tmp_path):
    import pyarrow
    from pyarrow import parquet

    good = pyarrow.array([b"a cat", b"\xff\xfe", b"a dog"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"image": [b"p"] * 3, "caption": good}), tmp_path / "a.parquet")
    shard = only(tmp_path / "a.parquet")
    first, second, third = read_shard(shard)
    assert [parse_shard_record(shard, raw).record.turns[1][1] for raw in (first, third)] == ["a cat", "a dog"]
    with pytest.raises(DataError, match=r"a\.parquet\[1\]: a text is not UTF-8"):
        parse_shard_record(shard, second)


@pytest.mark.parametrize("row", [{"img": b"x", "label": 3}, {"caption": "a cat", "url": "http://a"}])
def test_columns_that_hold_no_record_are_reported_beside_those_that_would(row, tmp_path):
    (raw,) = read_shard(only(write_parquet(tmp_path / "a.parquet", [row, row])))
    words = rf"a\.parquet has the columns {', '.join(row)}; expected conversations, or one"
    with pytest.raises(DataError, match=words):
        parse_shard_record(only(tmp_path / "a.parquet"), raw)


def test_what_is_no_parquet_file_is_reported_by_its_name(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"x" * 4000)
    (raw,) = read_shard(only(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match=r"a\.parquet: not a parquet file, or a corrupt one"):
        raise raw.error


def test_globs_and_braces_name_shards_in_one_order(tmp_path):
    write_caption_tars(tmp_path, [1] * 11)
    names = [shard.name for shard in find_shards(str(tmp_path / "*.tar"))]
    assert names == [f"{k:05d}.tar" for k in range(11)]
    assert [shard.name for shard in find_shards(str(tmp_path / "{00008..00010}.tar"))] == names[8:]
    assert [shard.name for shard in find_shards([str(tmp_path / "00003.tar"), str(tmp_path / "*3.tar")])] == names[3:4]
    with pytest.raises(DataError, match=r"00011\.tar is missing, 2 of 3 shards are there"):
        find_shards(str(tmp_path / "{00009..00011}.tar"))
    with pytest.raises(DataError, match="0 of 1 shards are there"):
        find_shards(str(tmp_path / "x*.parquet"))


def test_a_pattern_of_several_that_has_no_shard_is_missed(tmp_path):
    for part in (0, 1, 3):
        write_caption_tars(tmp_path / f"part{part}", [1, 1])
    with pytest.raises(DataError, match=r"part2/\*\.tar is missing, 3 of 4 patterns have shards there"):
        find_shards(str(tmp_path / "part{0..3}" / "*.tar"))
    with pytest.raises(DataError, match=r"\{00001\.\.00000\} counts down"):
        find_shards(str(tmp_path / "part0" / "{00001..00000}.tar"))


def test_a_shard_of_several_names_is_read_once(tmp_path):
    write_caption_tars(tmp_path, [1])
    path = f"{tmp_path}/00000.tar"
    (shard,) = find_shards([path, f"{tmp_path}/./00000.tar", f"file://{path}", os.path.relpath(path), str(tmp_path)])
    assert shard.path == path


def test_shards_of_capital_letters_and_with_brackets_are_found(tmp_path):
    directory = tmp_path / "run [1]"
    write_caption_tars(directory, [1])
    (directory / "00000.tar").rename(directory / "A.TAR")
    for path in (directory, directory / "A.TAR"):
        (shard,) = find_shards(str(path))
        assert (shard.name, shard.kind) == ("A.TAR", "tar")
    assert len(records_of(shard)) == 1


@pytest.mark.parametrize("conversation", [{"from": ["human", "gpt"], "value": ["q"]}, {"from": "human", "value": "q"}])
def test_turns_that_are_no_lists_of_one_length_are_reported_with_their_record(conversation, tmp_path):
    row = {"id": "7", "image": image_bytes(1), "conversations": conversation}
    shard = only(write_parquet(tmp_path / "a.parquet", [row]))
    with pytest.raises(DataError, match=r"record '7' \(a.parquet\[0\]\): the conversations are from .* equally long"):
        records_of(shard)


def test_an_error_of_the_network_is_not_one_of_the_file(hub_directory):
    class NetworkError(OSError):
        """As the Hub's: without a number."""

    class Down(DirFileSystem):
        def __init__(self, **kwargs):
            super().__init__(path=str(hub_directory), fs=fsspec.filesystem("file"))

        def open(self, *args, **kwargs):
            raise NetworkError("503 Service Unavailable")

    (hub_directory / "user" / "captions").mkdir(parents=True)
    write_parquet(hub_directory / "user" / "captions" / "a.parquet", [caption_row(1)])
    (shard,) = find_shards("hf://datasets/user/captions")
    fsspec.register_implementation("hf", Down, clobber=True)
    with pytest.raises(NetworkError):
        list(read_shard(shard))


@pytest.fixture
def hub_directory(tmp_path, monkeypatch):
    """A directory that answers to hf://, in the Hub's place."""

    class Hub(DirFileSystem):
        protocol = "hf"

        def __init__(self, **kwargs):
            super().__init__(path=str(tmp_path / "hub"), fs=fsspec.filesystem("file"))

    fsspec.register_implementation("hf", Hub, clobber=True)
    yield tmp_path / "hub" / "datasets"
    fsspec.register_implementation("hf", HfFileSystem, clobber=True)


def test_a_data_set_of_the_hub_is_all_its_shards(hub_directory):
    write_caption_tars(hub_directory / "user" / "captions" / "data", [2, 2])
    write_parquet(hub_directory / "user" / "captions" / "more.parquet", [caption_row(9)])
    shards = find_shards("hf://datasets/user/captions")
    assert [shard.path for shard in shards] == [
        "hf://datasets/user/captions/data/00000.tar",
        "hf://datasets/user/captions/data/00001.tar",
        "hf://datasets/user/captions/more.parquet",
    ]
    found = [record.turns[1][1] for shard in shards for record, _ in records_of(shard)]
    assert found == [caption_of(n) for n in (0, 1, 2, 3, 9)]
    assert find_shards("hf://datasets/user/captions/data/*.tar") == shards[:2]


def test_paths_say_whether_they_are_shards(tmp_path):
    assert is_shards(["a/{0..9}.tar", "b.parquet", "hf://datasets/user/name"])
    assert is_shards(str(tmp_path))
    assert not is_shards("train.json")
    assert not is_shards(None)
    with pytest.raises(DataError, match="one kind only"):
        is_shards(["a.tar", "b.json"])
    with pytest.raises(DataError, match="shards are read only by a training run"):
        open_sources(str(tmp_path / "a.tar"))


def test_a_python_whose_tar_files_have_no_position_is_named(tmp_path, monkeypatch):
    class Other:
        def __init__(self, fileobj):
            self.fileobj = fileobj

    write_caption_tars(tmp_path / "shards", [1])
    shard = find_shards(str(tmp_path / "shards"))[0]
    monkeypatch.setattr("tarfile.TarFile", Other)
    with pytest.raises(RuntimeError, match=r"with Python 3\.\d+.*: its tarfile.TarFile has no attribute offset, by"):
        records_of(shard)
