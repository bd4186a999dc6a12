"""Records of tar files, parquet and directories of `datasets`: every spelling, and no image passed over."""

import json

import pytest
from toy_shards import image_bytes, tar_files, write_parquet

from llava_lite.data.errors import DataError
from llava_lite.data.records.record import missing_images
from llava_lite.data.shards.read import find_shards, first_image, first_record, parse_shard_record, read_shard

ONE, TWO = image_bytes(1), image_bytes(2)
ASK = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
MESSAGES = [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}]
PARTS = [
    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "q"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
]


def read(path):
    """Return the records of all shards at a path, each with its images as bytes."""
    return [parse_shard_record(shard, raw) for shard in find_shards(str(path)) for raw in read_shard(shard)]


ROWS = [
    {"image": {"bytes": ONE, "path": None}, "conversations": ASK, "system": "S"},
    {"images": [{"bytes": ONE, "path": "a.png"}], "conversation": MESSAGES, "system": "S"},
    {"images": [ONE], "messages": MESSAGES, "system": "S"},
    {"image": ONE, "messages": PARTS, "system": "S"},
    {"jpg": ONE, "messages": json.dumps(MESSAGES), "system": "S"},
    {"image": [ONE], "conversations": {"from": ["human", "gpt"], "value": ["<image>q", "a"]}, "system": "S"},
    {"images": [ONE], "texts": [{"user": "q", "assistant": "a", "source": "x"}], "system": "S"},
    {"images": [ONE], "texts": {"user": ["q"], "assistant": ["a"]}, "system": "S"},
    {"image": ONE, "prompt": "q", "completion": "a", "system": "S"},
    {"image": ONE, "conversations": ASK, "system": "S", "image_path": "coco/1.png", "embedding": [0.5], "url": "u"},
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row))
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_rows_of_every_spelling_are_the_same_record(tmp_path, row, kind):
    if kind == "parquet":
        path = write_parquet(tmp_path / "a.parquet", [row, row])
    else:
        from datasets import Dataset

        path = tmp_path / "saved"
        Dataset.from_list([row, row]).save_to_disk(str(path))
    first, second = read(path)
    assert [text.replace("<image>\n", "<image>") for _, text in first.record.turns] == ["<image>q", "a"]
    assert first.record.system == "S"
    assert (first.images, first.record.images) == ((ONE,), ("image 0",))
    assert second.record.turns == first.record.turns


def test_image_features_of_datasets_are_read_from_a_saved_directory_and_resume_at_any_row(tmp_path):
    from datasets import Dataset, DatasetDict, Features, Image, Sequence, Value

    turns = [{"from": Value("string"), "value": Value("string")}]
    rows = [{"images": [{"bytes": image_bytes(k), "path": None}], "conversations": ASK} for k in range(5)]
    rows[3] = {"images": [], "conversations": [{"from": "human", "value": "q"}, ASK[1]]}
    saved = Dataset.from_list(rows, features=Features({"images": Sequence(Image()), "conversations": turns}))
    saved.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    (tmp_path / "saved" / "cache-0123.arrow").write_bytes(b"left by map")
    shards = find_shards(str(tmp_path / "saved"))
    assert [shard.name for shard in shards] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert [images for _, images in read(tmp_path / "saved")] == [
        (image_bytes(k),) if k != 3 else () for k in range(5)
    ]
    full = list(read_shard(shards[0]))
    for k, raw in enumerate(full):
        assert list(read_shard(shards[0], raw.after)) == full[k + 1 :]
    DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match=r"name one of its splits: .*both/train, .*both/test"):
        find_shards(str(tmp_path / "both"))
    assert len(find_shards(str(tmp_path / "both" / "train"))) == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"img": {"bytes": ONE, "path": None}, "conversations": ASK}, "the key 'img'"),
        ({"sample": {"image": {"bytes": ONE, "path": "1.png"}}, "conversations": ASK}, "the key 'sample'"),
        ({"sample": {"image": {"bytes": ONE, "path": "1.png"}}, "messages": PARTS}, "the key 'sample'"),
        ({"x": [ONE], "conversations": ASK}, "the key 'x'"),
        ({"video": {"bytes": b"x", "path": "1.mp4"}, "conversations": ASK}, "has 'video'; shards are read"),
        ({"image": {"bytes": None, "path": "1.png"}, "conversations": ASK}, "a path .'1.png'., expected the bytes"),
        ({"image": "coco/1.png", "conversations": ASK}, "a path .'coco/1.png'., expected the bytes"),
        ({"image": ONE, "images": [TWO], "conversations": ASK}, "and they differ"),
        ({"image": ONE, "conversations": ASK, "tools": "[{}]"}, "tools and functions"),
        ({"image": ONE, "conversations": "[{]"}, "not JSON"),
        ({"image": ONE, "caption": ["a", "b"]}, "data convert a.parquet OUT.json --answers first"),
        ({"image": ONE, "question": "q", "answer": "a"}, "the format 'question and answer'"),
        ({"img": ONE, "caption": "a"}, "--image_key img"),
    ],
)
def test_a_row_whose_images_would_not_be_seen_is_refused(tmp_path, row, words):
    with pytest.raises(DataError, match=words) as error:
        read(write_parquet(tmp_path / "a.parquet", [row]))
    assert "record '0' (a.parquet[0])" in str(error.value)


@pytest.mark.parametrize("row", [{"conversations": ASK}, {"conversations": ASK, "image": None, "x": 1}])
def test_rows_with_placeholders_and_no_column_of_images_are_known_as_such(tmp_path, row):
    ((record, images),) = read(write_parquet(tmp_path / "a.parquet", [row]))
    assert (record.images, images) == ((), ())
    assert "no image in record '0' (a.parquet[0])" in missing_images(record)


def json_file(**item):
    return [("r.json", json.dumps(item).encode())]


@pytest.mark.parametrize(
    "files",
    [
        [("r.png", ONE), *json_file(conversations=ASK)],
        [("r.png", ONE), *json_file(messages=MESSAGES)],
        [("r.png", ONE), *json_file(messages=PARTS)],
        [("r.png", ONE), *json_file(messages=MESSAGES, images=["elsewhere/r.png"], image_path="coco/1.png")],
        [("r.png", ONE), *json_file(messages=[{"role": "user", "content": [{"image": "r.png"}, {"text": "q"}]},
                                              MESSAGES[1]])],
        [("r.png", ONE), *json_file(texts=[{"user": "q", "assistant": "a"}])],
        [("r.png", ONE), *json_file(prompt="q", completion="a")],
    ],
)  # fmt: skip
def test_tar_samples_of_every_spelling_are_the_same_record(tmp_path, files):
    ((record, images),) = read(tar_files(tmp_path / "a.tar", files))
    assert [text.replace("<image>\n", "<image>") for _, text in record.turns] == ["<image>q", "a"]
    assert (record.images, images) == (("r.png",), (ONE,))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (json_file(conversations=ASK, images=["1.png"]), "names an image, but the shard has no file"),
        ([("r.heic", ONE), *json_file(conversations=ASK)], "has a file 'heic', which is not read"),
        ([("r.mp4", ONE), *json_file(conversations=ASK)], "has a file 'mp4', which is not read"),
        ([("r.png", ONE), *json_file(messages=[{"role": "user", "content": [{"image": "s.png"}]}, MESSAGES[1]])],
         "names the image 's.png'; the files of the sample are r.png"),
        ([("r.png", ONE), *json_file(conversations=ASK, objects={"bbox": [[1, 2, 3, 4]]})], "boxes and objects"),
        ([("r.0.png", ONE), ("r.1.png", TWO), ("r.txt", b"a cat")], "2 images and a caption"),
    ],
)  # fmt: skip
def test_a_tar_sample_whose_images_would_not_be_seen_is_refused(tmp_path, files, words):
    with pytest.raises(DataError, match=words):
        read(tar_files(tmp_path / "a.tar", files))


def test_shards_without_an_image_are_known_before_they_are_read_through(tmp_path):
    text = {"conversations": [{"from": "human", "value": "q"}, ASK[1]]}
    rows = [text | {"image": None}] * 40
    assert first_image(find_shards(str(write_parquet(tmp_path / "text.parquet", rows)))) == 40
    rows[30] = {"conversations": ASK, "image": ONE}
    (shard,) = find_shards(str(write_parquet(tmp_path / "one.parquet", rows)))
    assert first_image([shard]) == 0
    assert first_record([shard]).turns[0] == ("human", "q")


@pytest.mark.parametrize("key", ["audio", "point", "depth", "image_weight"])
def test_media_beside_images_are_refused_in_shards(tmp_path, key):
    value = 0.5 if key.endswith("weight") else "a.file"
    row = {"image": ONE, "conversations": ASK, key: value}
    files = [("r.png", ONE), ("r.json", json.dumps({"conversations": ASK, key: value}).encode())]
    for path in (write_parquet(tmp_path / "a.parquet", [row]), tar_files(tmp_path / "a.tar", files)):
        with pytest.raises(DataError, match=f"record '.*' .*has '{key}'; shards are read for images alone"):
            read(path)
