"""COCO captions: one prompt for all images, and the file of its server; CIDEr where its program is installed."""

import json
import shutil
import sys

import pytest
from toy_eval_data import load, png, reds, write_images, write_json, write_table

PROMPT = "Provide a one-sentence caption for the provided image."


def write(directory, split="val2017"):
    """Write the files of COCO: two images with two captions each, which stand apart."""
    write_images(directory / split, **{"000000000042": 10, "000000000007": 20})
    images = [{"id": 42, "file_name": "000000000042.png"}, {"id": 7, "file_name": "000000000007.png"}]
    captions = [(7, "a red bus in a street"), (42, "a cat sleeps"), (7, "a bus"), (42, "a sleeping cat on a sofa")]
    annotations = [{"image_id": image, "id": i, "caption": text} for i, (image, text) in enumerate(captions)]
    write_json(directory / "annotations" / f"captions_{split}.json", {"images": images, "annotations": annotations})


@pytest.mark.parametrize("split", ["val2017", "val2014"])
def test_every_image_is_asked_about_once(tmp_path, split):
    write(tmp_path, split)
    _, _, questions = load("coco", tmp_path, split)
    assert [(q.id, q.text, q.truth) for q in questions] == [
        (42, PROMPT, ["a cat sleeps", "a sleeping cat on a sofa"]),
        (7, PROMPT, ["a red bus in a street", "a bus"]),
    ]
    assert [reds(question) for question in questions] == [[10], [20]]


def test_upload_is_a_list_of_captions(tmp_path):
    write(tmp_path)
    benchmark, options, questions = load("coco", tmp_path)
    (path,) = benchmark.write(tmp_path / "out", questions, ["A cat.", "A bus."], options)
    assert path.name == "captions_val2017_results.json"
    assert json.loads(path.read_text()) == [
        {"image_id": 42, "caption": "A cat."},
        {"image_id": 7, "caption": "A bus."},
    ]


def test_without_pycocoevalcap_the_score_says_what_to_install(tmp_path, monkeypatch):
    for name in ("pycocoevalcap", "pycocoevalcap.cider", "pycocoevalcap.cider.cider"):
        monkeypatch.setitem(sys.modules, name, None)
    write(tmp_path)
    benchmark, options, questions = load("coco", tmp_path)
    scores = benchmark.score(questions, ["A cat.", "A bus."], options)
    assert scores.main is None
    assert "pip install pycocoevalcap" in scores.notes[0]


@pytest.mark.skipif(shutil.which("java") is None, reason="CIDEr's tokenizer runs in Java")
def test_caption_of_a_person_scores_higher_than_another_images(tmp_path):
    pytest.importorskip("pycocoevalcap")
    write(tmp_path)
    benchmark, options, questions = load("coco", tmp_path)
    scores = benchmark.score(questions, ["A cat sleeps.", "a sleeping cat"], options)
    assert scores.each[0] > 1
    assert scores.each[1] == 0
    assert scores.main == pytest.approx(50 * scores.each[0])


def test_table_of_hugging_face_gives_the_same_questions(tmp_path):
    write(tmp_path / "own", "val2014")
    own = load("coco", tmp_path / "own", "val2014")[2]
    rows = [
        {"question_id": f"COCO_val2014_{q.id:012}.jpg", "answer": q.truth, "id": 5, "image": png(colour)}
        for q, colour in zip(own, (10, 20), strict=True)
    ]
    write_table(tmp_path / "hub" / "data" / "val-00000-of-00001.parquet", rows)
    hub = load("coco", tmp_path / "hub", "val2014")[2]
    assert [q._replace(images=()) for q in hub] == [q._replace(images=()) for q in own]
    assert [reds(question) for question in hub] == [[10], [20]]
    with pytest.raises(ValueError, match="holds the table of val2014: give --split val2014"):
        load("coco", tmp_path / "hub")


def test_what_is_missing_or_wrong_is_said(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"captions_val2014.json    from http[^$]*annotations_trainval2014.zip"
    ):
        load("coco", tmp_path, "val2014")
    write_json(
        tmp_path / "annotations" / "captions_val2017.json",
        {"images": [], "annotations": [{"image_id": 3, "id": 0, "caption": "x"}]},
    )
    with pytest.raises(ValueError, match="a caption is about image 3, which is not in its images"):
        load("coco", tmp_path)
