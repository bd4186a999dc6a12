"""No image is passed over: keys x values x kinds of files, each read or refused with the key and the record."""

import base64
import json

import pytest
from conftest import draw_image
from toy_shards import image_bytes, tar_files, write_parquet

from llava_lite.data.errors import DataError
from llava_lite.data.index.annotations import open_annotations
from llava_lite.data.records.record import missing_images, parse_record
from llava_lite.data.shards.read import find_shards, parse_shard_record, read_shard

ASK, ANSWER = {"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}
TURNS = [ASK, ANSWER]
TEXT = [{"from": "human", "value": "q"}, ANSWER]
PNG = image_bytes(1)

READ_KEYS = ["image", "images"]
OTHER_NAMES = """
image_path image_paths img imgs img_path picture pictures pic photo image_file image_files imageFile image_url
image_urls image_name image1 input_image file_name filename screenshot frames pixel_values Image IMAGE image_b64
image-path jpg png
"""
OTHER_KEYS = OTHER_NAMES.split()
SOUND_KEYS = ["video", "videos", "video_path", "audio", "audios", "clip"]
ABOUT_KEYS = {
    "image_id": 123,
    "image_size": [3, 4],
    "image_width": 3,
    "has_image": True,
    "video_id": "x",
    "source": "coco",
    "url": "https://a.org/1.png",
    "license": "CC",
    "image_source": "coco",
    "caption": "a remark",
    "title": "How to open a.jpg",
    "photo_by": "Ann",
}


def lines(record):
    return (json.dumps(record) + "\n").encode()


def first(tmp_path, kind, record):
    """Return the record as it is read from a file of a kind; DataError if it is refused."""
    for k in range(3):
        draw_image(k).save(tmp_path / f"{k}.png")
    if kind in ("json", "jsonl", "yaml"):
        path = tmp_path / f"a.{kind if kind != 'yaml' else 'json'}"
        path.write_text(json.dumps([record]) if kind != "jsonl" else json.dumps(record) + "\n")
        if kind == "yaml":
            (tmp_path / "mix.yaml").write_text(f"datasets: [{{json_path: {path}}}]")
            path = tmp_path / "mix.yaml"
        found = open_annotations(str(path), str(tmp_path), cache_dir=str(tmp_path / "cache"))[0]
    elif kind == "parquet":
        (shard,) = find_shards(str(write_parquet(tmp_path / "a.parquet", [record])))
        found = parse_shard_record(shard, next(iter(read_shard(shard)))).record
    else:
        (shard,) = find_shards(str(tar_files(tmp_path / "a.tar", [("r.json", lines(record))])))
        found = parse_shard_record(shard, next(iter(read_shard(shard)))).record
    reason = missing_images(found)
    if reason is not None:
        raise DataError(reason)
    return found


def value_for(kind):
    """Return an image as a record of a kind of file holds it."""
    return {"bytes": PNG, "path": None} if kind == "parquet" else "1.png"


@pytest.mark.parametrize("kind", ["json", "jsonl", "yaml", "parquet"])
@pytest.mark.parametrize("shape", ["one", "list"])
@pytest.mark.parametrize("key", READ_KEYS)
def test_images_under_their_own_keys_are_seen(tmp_path, kind, shape, key):
    value = value_for(kind)
    record = first(tmp_path, kind, {"id": "r", "conversations": TURNS, key: [value] if shape == "list" else value})
    assert len(record.images) == 1
    assert record.turns == (("human", "<image>\nq"), ("gpt", "a"))


@pytest.mark.parametrize("kind", ["json", "jsonl", "yaml", "parquet", "tar"])
@pytest.mark.parametrize("key", OTHER_KEYS)
@pytest.mark.parametrize("turns", [TURNS, TEXT])
def test_images_under_another_key_are_refused_with_key_and_record(tmp_path, kind, key, turns):
    value = value_for(kind)
    if kind == "parquet" and key in ("jpg", "png"):
        # A column of images in the way of WebDataset: seen, or refused where no placeholder asks for it.
        record = {"id": "r", "conversations": turns, key: value}
        if turns is TURNS:
            assert len(first(tmp_path, kind, record).images) == 1
        else:
            with pytest.raises(DataError, match="0 <image> placeholders in the conversation but 1 images"):
                first(tmp_path, kind, record)
        return
    with pytest.raises(DataError, match=r"would not be seen|no image in record 'r'|names an image") as error:
        first(tmp_path, kind, {"id": "r", "conversations": turns, key: [value] if key.endswith("s") else value})
    assert key in str(error.value)
    assert "record 'r'" in str(error.value)


@pytest.mark.parametrize("kind", ["json", "parquet", "tar"])
@pytest.mark.parametrize("key", SOUND_KEYS)
def test_video_and_audio_are_refused_with_or_without_placeholders(tmp_path, kind, key):
    for turns in (TURNS, TEXT):
        refused = f"has a '{key}', which is not read: a model with ImageBind as its tower reads the path of a video"
        if key in ("video", "audio"):
            # Of a JSON file they are read, and stand for an image.
            refused = f"'r' .* has '{key}'; shards are read for images alone"
            if kind == "json" and turns is TURNS:
                (mix,) = first(tmp_path, kind, {"id": "r", "conversations": turns, key: "a.mp4"}).images
                assert mix.kinds == (key,)
                continue
            if kind == "json":
                refused = f"0 <image> placeholders .* its media .{key}. together are one image"
        with pytest.raises(DataError, match=refused):
            first(tmp_path, kind, {"id": "r", "conversations": turns, key: "a.mp4"})


@pytest.mark.parametrize("value", [None, [], "absent"])
@pytest.mark.parametrize("key", READ_KEYS)
@pytest.mark.parametrize("kind", ["json", "jsonl", "yaml", "parquet", "tar"])
def test_a_placeholder_without_an_image_is_refused(tmp_path, kind, key, value):
    item = {"id": "r", "conversations": TURNS} | ({} if value == "absent" else {key: value})
    with pytest.raises(DataError, match="1 <image> placeholder in the conversation but no image in record 'r'"):
        first(tmp_path, kind, item)


@pytest.mark.parametrize("value", ["", [""], [None], {}, 0, False, [{"bytes": None}]])
@pytest.mark.parametrize("key", READ_KEYS)
@pytest.mark.parametrize("turns", [TURNS, TEXT])
def test_an_empty_image_is_refused(key, value, turns):
    with pytest.raises(DataError, match=f"'{key}' holds"):
        parse_record({"id": "r", "conversations": turns, key: value}, "here")


def test_an_object_of_nothing_but_nulls_is_no_image():
    absent = {"bytes": None, "path": None}
    assert parse_record({"id": "r", "conversations": TEXT, "image": absent}, "here").images == ()
    record = parse_record({"id": "r", "conversations": TURNS, "image": absent}, "here")
    assert missing_images(record).startswith("1 <image> placeholder in the conversation but no image in record 'r'")


@pytest.mark.parametrize("kind", ["json", "parquet", "tar"])
@pytest.mark.parametrize(("key", "value"), ABOUT_KEYS.items())
def test_keys_about_an_image_are_no_images(tmp_path, kind, key, value):
    assert first(tmp_path, kind, {"id": "r", "conversations": TEXT, key: value}).images == ()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"image": "1.png", "images": ["1.png"]}, None),
        ({"image": None, "images": ["1.png"]}, None),
        ({"image": [], "images": "1.png"}, None),
        ({"image": "1.png", "image_path": "1.png"}, None),
        ({"image": "coco/1.png", "image_path": "1.png"}, None),
        ({"image": "coco/1.png", "image_name": "1"}, None),
        ({"image": "1.png", "image_url": "https://a.org/9.png"}, None),
        ({"image": "1.png", "img": None, "video": [], "audios": ""}, None),
        ({"image": "1.png", "images": ["2.png"]}, "'image' .1. and 'images' .1., and they differ"),
        ({"image": "1.png", "images": ["1.png", "2.png"]}, "and they differ"),
        ({"image": "1.png", "image_path": "2.png"}, "others under 'image_path'"),
        ({"image": "1.png", "images_extra": ["2.png"]}, "others under 'images_extra'"),
        ({"image": "1.png", "video": "a.mp4", "image_name": "1"}, None),
        ({"image": "1.png", "videos": "a.mp4"}, "has a 'videos', which is not read"),
        ({"image": "1.png", "mask": "m.png"}, None),
        ({"image": "1.png", "mask": {"bytes": PNG, "path": None}}, "others under 'mask'"),
        ({"image": "1.png", "mask": "data:image/png;base64,AAAA"}, "others under 'mask'"),
    ],
)
def test_two_keys_at_once_agree_or_are_refused(more, words):
    item = {"id": "r", "conversations": TURNS} | more
    if words is None:
        assert len(parse_record(item, "here").images) == 1
    else:
        with pytest.raises(DataError, match=words):
            parse_record(item, "here")


@pytest.mark.parametrize(
    "where",
    [
        {"a": {"file": "1.png"}},
        {"photo_of": "1.png"},
        {"path": "1.png"},
        {"x": ["1.png"]},
        {"x": "data:image/png;base64,"},
        {"b64": base64.b64encode(PNG).decode()},
    ],
)
@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_file_of_an_image_under_any_key_is_not_passed_over(tmp_path, kind, where):
    with pytest.raises(DataError, match="an image that would not be seen"):
        first(tmp_path, kind, {"id": "r", "conversations": TEXT} | where)


@pytest.mark.parametrize("text", ["Qk is a prefix of base64 " * 9, "/9j/", "deadbeef" * 20])
def test_a_text_that_begins_like_an_image_is_none(text):
    assert parse_record({"id": "r", "conversations": TEXT, "note": text}, "here").images == ()


PLACEHOLDERS = [
    "Image 1: <img>a.jpg</img>\nq",
    "<|image_1|>\nq",
    "q <|image_pad|>",
    "<ImageHere>q",
    "<image 1> q",
    "q <image_2>",
    "<Image>\nq",
    "<video>\nq",
    " <IMAGE>q",
    "q\n<img>",
    "q\n<audio>\n",
    "[IMG]q",
    "<start_of_image>q",
    "<|video|>q",
]


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize("text", PLACEHOLDERS)
def test_a_placeholder_of_another_family_without_an_image_is_refused(tmp_path, kind, text):
    turns = [{"from": "human", "value": text}, ANSWER]
    with pytest.raises(DataError, match="in a question but no image in record 'r'"):
        first(tmp_path, kind, {"id": "r", "conversations": turns})


@pytest.mark.parametrize(
    "text",
    [
        "<img src='a.jpg'> what?",
        "What does <img> do?",
        "<html>\n<video>\n<source src='a'>\n</video>",
        "a < image > b",
        "x[img]",
        "<Image Source='a'/>",
    ],
)
def test_tags_in_a_text_are_no_placeholders(text):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "<video>\nis a tag"}]
    assert missing_images(parse_record({"id": "r", "conversations": turns}, "here")) is None


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
def test_a_system_text_is_read_from_its_keys(tmp_path, kind, key):
    assert first(tmp_path, kind, {"id": "r", "conversations": TEXT, key: "Be kind."}).system == "Be kind."
    with pytest.raises(DataError, match=f"under '{key}' and another in its system turn"):
        first(tmp_path, kind, {"id": "r", "conversations": [{"from": "system", "value": "x"}, *TEXT], key: "y"})


def test_two_system_keys_agree_or_are_refused():
    item = {"id": "r", "conversations": TEXT, "system": "a"}
    assert parse_record(item | {"system_prompt": "a"}, "here").system == "a"
    with pytest.raises(DataError, match="'system' and 'system_prompt', and they differ"):
        parse_record(item | {"system_prompt": "b"}, "here")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tools": [{"name": "f"}]}, "'tools' .list.: tools and functions"),
        ({"tools": "[{}]"}, "tools and functions"),
        ({"objects": {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}}, "boxes and objects are not read"),
        ({"bbox": [1, 2, 3, 4]}, "boxes and objects are not read"),
        ({"weight": 0}, "a weight or switch of a record"),
        ({"weight": 0.5}, "a weight or switch of a record"),
        ({"loss": False}, "a weight or switch of a record"),
        ({"history": [["a", "b"]]}, "it would be lost beside a conversation"),
        ({"input": "more"}, "it would be lost beside a conversation"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "arguments of a chat template"),
        ({"chosen": "a", "rejected": "b"}, "'chosen', 'rejected': preference data"),
        ({"rejected_response": "b"}, "preference data"),
        ({"kto_tag": True}, "preference data"),
        ({"label": True}, "preference data"),
        ({"messages": TEXT}, "'conversations' and 'messages'; only one conversation is read"),
        ({"instruction": "i", "output": "o"}, "could be a conversation or Alpaca"),
        ({"prompt": "p", "completion": "c"}, "could be a conversation or prompt and completion"),
    ],
)
def test_keys_that_would_change_what_is_supervised_are_refused(more, words):
    with pytest.raises(DataError, match=words) as error:
        parse_record({"id": "r", "conversations": TEXT} | more, "here")
    assert "record 'r' (here)" in str(error.value)


@pytest.mark.parametrize(
    "more",
    [
        {"tools": "[]", "history": [], "input": "", "objects": {"ref": [], "bbox": []}, "weight": 1, "loss": True},
        {"label": 3, "score": 0.5, "model": "x", "task": "vqa", "train": None, "system": "", "videos": []},
    ],
)
def test_keys_that_mean_nothing_are_passed_over(more):
    assert parse_record({"id": "r", "conversations": TEXT} | more, "here").turns == (("human", "q"), ("gpt", "a"))


def test_an_answer_with_a_placeholder_is_refused():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "See <image>."}]
    with pytest.raises(DataError, match="an answer has <image>, so its question comes before the image"):
        parse_record({"id": "r", "image": "1.png", "conversations": turns}, "here")
