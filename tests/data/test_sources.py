"""A path that is no file of records of ours is answered with what it is and what to do about it."""

import json

import pytest
from conftest import draw_picture

from llava_lite.data.index import open_annotations
from llava_lite.data.scan import DataError
from llava_lite.data.shards import find_shards
from llava_lite.data.sources import open_sources

TALK = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
COCO = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"image_id": 1, "caption": "c"}]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"instruction": "i", "output": "o"}], "the format 'Alpaca', .*data convert {path} a_llava.json"),
        (COCO, "the format 'COCO captions', .*data convert {path} a_llava.json --answers first"),
        ({"questions": [{"question": "q"}]}, "'VQA questions', .*--annotations ANSWERS.json --answers majority"),
        ({"annotations": [{"answers": []}]}, "'VQA answers', which is not supported: name the file of its questions"),
        ([{"text_list": ["a"], "image_info": []}], "a.json is of the format 'MMC4', which is not supported"),
        ([{"images": ["u", None], "texts": [None, "a"]}], "a.json is of the format 'OBELICS', which is not"),
        ({"d": {"root": "x", "annotation": "y"}}, "'InternVL meta', .*data convert {path}"),
        ({"d": {"file_name": "x.json"}}, "'LLaMA-Factory dataset_info', .*--dataset d"),
        ({"data": [{"question": "q"}]}, "holds its records under 'data'"),
        ([[TALK]], "holds lists of records .Qwen-VL's packed data."),
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
    path.write_text(json.dumps([TALK, {"instruction": "i", "output": "o"}, TALK]))
    assert open_annotations(str(path)).record_facts().num_images.tolist() == [0, -1, 0]


def test_tables_and_directories_are_named_with_the_command(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\n1.png,c\n")
    with pytest.raises(DataError, match=r"a\.csv is a table, which is converted first: llava-lite data convert"):
        open_sources(str(tmp_path / "a.csv"))
    folder = tmp_path / "folder"
    (folder / "train").mkdir(parents=True)
    draw_picture(1).save(folder / "train" / "1.png")
    for opened in (find_shards, open_sources):
        with pytest.raises(DataError, match=r"no captions to learn from: write a metadata\.csv"):
            opened(str(folder))
    (folder / "train" / "metadata.csv").write_text("file_name,text\n1.png,c\n")
    for opened in (find_shards, open_sources):
        with pytest.raises(DataError, match=f"is an ImageFolder .*llava-lite data convert {folder} folder_llava.json"):
            opened(str(folder))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "a.json").write_text("[]")
    with pytest.raises(DataError, match=r"name its annotation files one by one: .*annotations/a\.json"):
        find_shards(str(tmp_path / "annotations"))
