"""easy-VQA: a directory of its layout, or its package."""

import sys

import pytest
import toy_benchmarks as toy

from llava_lite.eval.benchmarks.base import Options
from llava_lite.eval.benchmarks.easy_vqa import EasyVqa


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package easy_vqa whose import fails: its data is read without importing it."""
    (tmp_path / "lib/easy_vqa").mkdir(parents=True)
    (tmp_path / "lib/easy_vqa/__init__.py").write_text("raise RuntimeError")
    toy.easy_vqa(tmp_path / "lib/easy_vqa/data")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.delitem(sys.modules, "easy_vqa", raising=False)
    return tmp_path / "lib/easy_vqa/data"


def test_questions_are_those_of_the_directory_or_else_of_the_package(tmp_path, package):
    questions = EasyVqa().load(tmp_path / "none", Options("train"))
    assert questions[0].text == "what shape is in the image?\nAnswer the question using a single word or phrase."
    assert questions[0].images == (str(package / "train/images/0.png"),)
    assert [question.truth for question in questions] == ["circle", "no", "teal", "yes"]
    toy.easy_vqa(tmp_path / "own")
    questions = EasyVqa().load(tmp_path / "own", Options("test"))
    assert questions[0].images == (str(tmp_path / "own/test/images/0.png"),)


def test_score_is_by_kind_and_forgives_case_and_points(package, tmp_path):
    questions = EasyVqa().load(tmp_path / "not_there", Options("test"))
    scores = EasyVqa().score(questions, ["Circle.", "yes", " teal\n", "yes"], Options("test"))
    assert scores.each == [1, 0, 1, 1]
    assert (scores.main, scores.table) == (75, {"shape": 100, "yes or no": 50, "colour": 100})


def test_a_question_of_another_form_is_shown(tmp_path):
    toy.easy_vqa(tmp_path)
    toy.write_json(tmp_path / "test/questions.json", [["what?", "circle"]])
    with pytest.raises(
        ValueError, match=r"question 0 is \['what\?', 'circle'\]; expected \[question, answer, image\]"
    ):
        EasyVqa().load(tmp_path, Options("test"))
