"""A path that is no file of records of ours is answered with what it is and what to do about it."""

import json

import pytest
from conftest import draw_image

from llava_lite.data.errors import DataError
from llava_lite.data.index.annotations import open_annotations
from llava_lite.data.index.sources import open_sources
from llava_lite.data.shards.read import find_shards

CONVERSATION = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
COCO = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"image_id": 1, "caption": "c"}]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"query": "q", "response": "a"}], "the format 'query and response'; .*data convert {path} a_llava.json"),
        (COCO, "the format 'COCO captions'; .*data convert {path} a_llava.json --answers first"),
        ({"questions": [{"question": "q"}]}, "'VQA questions'; .*--annotations ANSWERS.json --answers majority"),
        ({"annotations": [{"answers": []}]}, "'VQA answers', which is not supported: name the file of its questions"),
        ([{"text_list": ["a"], "image_info": []}], "a.json is of the format 'MMC4', which is not supported"),
        ([{"images": ["u", None], "texts": [None, "a"]}], "a.json is of the format 'OBELICS', which is not"),
        ({"d": {"root": "x", "annotation": "y"}}, "'InternVL meta'; .*data convert {path}"),
        ({"d": {"file_name": "x.json"}}, "'LLaMA-Factory dataset_info'; .*--dataset d"),
        ({"data": [{"question": "q"}]}, "has its records under 'data'"),
        ([[CONVERSATION]], "has lists of records .Qwen-VL's packed data."),
        ({"info": 3}, "found '{{', expected a list of records"),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_file_of_another_format_is_named_with_the_command(tmp_path, content, words, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content, indent=indent))
    if indent is None and isinstance(content, dict) and ("data" in content or "info" in content):
        # One line is read as JSON lines, of which this is a wrong one.
        assert open_annotations(str(path)).record_facts().num_images.tolist() == [-1]
        return
    with pytest.raises(DataError, match=words.format(path=path)):
        open_annotations(str(path))


def test_one_record_of_another_format_is_its_own_fault_only(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([CONVERSATION, {"query": "q", "response": "a"}, CONVERSATION]))
    assert open_annotations(str(path)).record_facts().num_images.tolist() == [0, -1, 0]


@pytest.mark.parametrize("name", ["alpaca_gpt4_data_zh.json", "alpaca_data_zh_51k.json", "alpaca_data.jsonl"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_alpaca_files_are_read_as_published_in_any_language(tmp_path, name, bom):
    items = [{"instruction": "翻译下列句子。", "input": "红色的方块", "output": "A red square."}]
    items += [{"instruction": "保持健康的三个提示。", "input": "", "output": "以下是:\n\n1. 🏃"}]
    lines = "\n".join(json.dumps(item, ensure_ascii=False) for item in items)
    text = lines if name.endswith("l") else json.dumps(items, ensure_ascii=False, indent=4)
    (tmp_path / name).write_bytes(bom + text.encode())
    annotations = open_annotations(str(tmp_path / name))
    assert [annotations[i].turns for i in range(2)] == [
        (("human", "翻译下列句子。\n\n### Input:\n红色的方块"), ("gpt", "A red square.")),
        (("human", "保持健康的三个提示。"), ("gpt", "以下是:\n\n1. 🏃")),
    ]


def test_tables_and_directories_are_named_with_the_command(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\n1.png,c\n")
    with pytest.raises(DataError, match=r"a\.csv is a table; convert it first: llava-lite data convert"):
        open_sources(str(tmp_path / "a.csv"))
    directory = tmp_path / "folder"
    (directory / "train").mkdir(parents=True)
    draw_image(1).save(directory / "train" / "1.png")
    for opened in (find_shards, open_sources):
        with pytest.raises(DataError, match=r"no captions to train on: write a metadata\.csv"):
            opened(str(directory))
    (directory / "train" / "metadata.csv").write_text("file_name,text\n1.png,c\n")
    for opened in (find_shards, open_sources):
        with pytest.raises(
            DataError, match=f"is an ImageFolder .*llava-lite data convert {directory} folder_llava.json"
        ):
            opened(str(directory))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "a.json").write_text("[]")
    with pytest.raises(DataError, match=r"name its annotation files one by one: .*annotations/a\.json"):
        find_shards(str(tmp_path / "annotations"))
