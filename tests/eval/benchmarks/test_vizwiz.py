"""VizWiz: val is scored, test is written for the server."""

import json

import pytest
import toy_benchmarks as toy

from llava_lite.eval.benchmarks.base import Options
from llava_lite.eval.benchmarks.vizwiz import VizWiz

VAL, TEST = Options("val"), Options("test")
ENDING = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    "\nAnswer the question using a single word or phrase."
)


def test_prompts_are_llavas(tmp_path):
    toy.vizwiz(tmp_path)
    val, test = VizWiz().load(tmp_path, VAL), VizWiz().load(tmp_path, TEST)
    # Upper and lower case as in the file, which lmms-eval changes.
    assert [question.text for question in val] == [f"What is this?{ENDING}", f"what Color is IT?{ENDING}"]
    assert val[0].images == (str(tmp_path / "val/VizWiz_val_00000000.jpg"),)
    assert [(question.id, question.text) for question in test] == [
        (number, f"What is this?{ENDING}") for number in (0, 1)
    ]
    assert test[0].images == (str(tmp_path / "test/VizWiz_test_00000001.jpg"),)


def test_val_is_scored_by_soft_accuracy_for_each_type(tmp_path):
    toy.vizwiz(tmp_path)
    questions = VizWiz().load(tmp_path, VAL)
    # "can of soup" said one of ten; two said blue.
    scores = VizWiz().score(questions, ["The can of soup", "blue"], VAL)
    assert scores.each == pytest.approx([0.3, 0.6])
    assert scores.main == pytest.approx(45)
    assert scores.table == pytest.approx({"other": 30, "unanswerable": 60})
    assert VizWiz().score(questions, ["soup", "Unanswerable"], VAL).main == 100


def test_upload_has_the_images_in_the_order_of_the_file(tmp_path):
    toy.vizwiz(tmp_path)
    toy.vizwiz_table(tmp_path / "table")
    for directory in (tmp_path, tmp_path / "table"):
        questions = VizWiz().load(directory, TEST)
        (path,) = VizWiz().write(tmp_path / "out", questions, ["A soup.", "Unanswerable"], TEST)
        assert json.loads(path.read_text()) == [
            {"image": "VizWiz_test_00000001.jpg", "answer": "soup"},
            {"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"},
        ]
        assert VizWiz().score(questions, ["", ""], TEST).main is None
    assert VizWiz().write(tmp_path, questions, ["", ""], VAL) == []


def test_what_test_needs_is_listed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"llava_test\.jsonl    from LLaVA's eval\.zip"):
        VizWiz().load(tmp_path, TEST)


def test_another_file_of_questions_finds_its_answers_by_image(tmp_path):
    toy.vizwiz(tmp_path)
    lines = [{"question_id": 7, "image": "VizWiz_val_00000001.jpg", "text": "Colour?"}]
    toy.write_lines(tmp_path / "mine.jsonl", lines)
    (question,) = VizWiz().load(tmp_path, VAL._replace(questions="mine.jsonl"))
    assert question.truth.answers == toy.VIZWIZ[1][3]
    toy.write_lines(tmp_path / "mine.jsonl", [{**lines[0], "image": "x.jpg"}])
    with pytest.raises(ValueError, match=r"question 'x\.jpg' is not in .*val\.json"):
        VizWiz().load(tmp_path, VAL._replace(questions="mine.jsonl"))
