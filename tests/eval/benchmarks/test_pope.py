"""POPE: yes or no about objects, in three parts."""

import json

import pytest
import toy_benchmarks as toy

from llava_lite.eval.benchmarks.base import Options
from llava_lite.eval.benchmarks.pope import Pope


def test_prompts_are_llavas(tmp_path):
    toy.pope(tmp_path)
    questions = Pope().load(tmp_path, Options())
    assert [question.text for question in questions[:2]] == [
        "Is there a dog in the image?\nAnswer the question using a single word or phrase.",
        "Is there a cat in the image?\nAnswer the question using a single word or phrase.",
    ]
    assert [question.images for question in questions[:2]] == [
        (str(tmp_path / f"val2014/COCO_val2014_00000000000{number}.jpg"),) for number in (1, 2)
    ]
    assert [question.id for question in questions] == [1, 2, 1, 2, 1, 2]
    assert [question.category for question in questions] == [part for part, *_ in toy.POPE]
    assert [question.truth for question in questions] == ["yes", "no"] * 3


def test_labels_alone_are_enough(tmp_path):
    toy.pope(tmp_path)
    from_llava = Pope().load(tmp_path, Options())
    (tmp_path / "llava_pope_test.jsonl").unlink()
    alone = Pope().load(tmp_path, Options())
    # The parts come in the order of papers, and not in that of LLaVA's file.
    assert [question.category for question in alone] == [*["random"] * 2, *["popular"] * 2, *["adversarial"] * 2]
    assert sorted(alone) == sorted(from_llava)


def test_labels_are_found_by_image_and_text_in_any_order(tmp_path):
    toy.pope(tmp_path)
    path = tmp_path / "llava_pope_test.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    expected = Pope().load(tmp_path, Options())
    path.write_text("".join(lines[::-1]))
    assert Pope().load(tmp_path, Options()) == expected[::-1]


def test_score_is_the_mean_f1_of_the_parts(tmp_path):
    toy.pope(tmp_path)
    benchmark, options = Pope(), Options()
    questions = benchmark.load(tmp_path, options)
    # adversarial: both right, F1 1. popular: yes, yes: precision 1/2, recall 1, F1 2/3. random: no, no: F1 0.
    answers = ["Yes", "No", "yes", "It is there", "No.", "There is not a kite"]
    scores = benchmark.score(questions, answers, options)
    assert scores.main == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)
    assert scores.each == [1, 1, 1, 0, 0, 1]
    assert scores.table["popular: F1"] == pytest.approx(100 * 2 / 3)
    assert (scores.table["popular: precision"], scores.table["popular: recall"]) == (50, 100)
    assert (scores.table["random: accuracy"], scores.table["random: yes"]) == (50, 0)
    assert scores.interval[0] <= scores.main <= scores.interval[1]
    assert scores.notes == ()


def test_parts_that_were_not_asked_are_named(tmp_path):
    toy.pope(tmp_path)
    questions = Pope().load(tmp_path, Options())[:2]
    scores = Pope().score(questions, ["yes", "no"], Options())
    assert (scores.main, scores.notes) == (100, ("Only the part adversarial was asked.",))


def test_a_question_of_another_release_is_refused(tmp_path):
    toy.pope(tmp_path)
    path = tmp_path / "llava_pope_test.jsonl"
    path.write_text(path.read_text().replace("kite", "boat"))
    with pytest.raises(
        ValueError, match=r"question 2, 'Is there a boat in the image\?' about COCO.*2\.jpg, has no label"
    ):
        Pope().load(tmp_path, Options())


def test_a_broken_label_is_named(tmp_path):
    toy.pope(tmp_path)
    path = tmp_path / "coco/coco_pope_random.json"
    path.write_text(path.read_text().replace('"no"', '"maybe"'))
    with pytest.raises(ValueError, match="question 2 has the label 'maybe'; expected yes or no"):
        Pope().load(tmp_path, Options())
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r"line 1 holds a list; expected question_id, image, text, label"):
        Pope().load(tmp_path, Options())


def test_a_question_that_stands_twice_is_refused(tmp_path):
    toy.pope(tmp_path)
    path = tmp_path / "llava_pope_test.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[0]]))
    with pytest.raises(ValueError, match="twice, which would count twice"):
        Pope().load(tmp_path, Options())


def test_a_question_with_both_labels_is_refused(tmp_path):
    toy.pope(tmp_path)
    path = tmp_path / "coco/coco_pope_random.json"
    first = path.read_text().splitlines()[0]
    other = first.replace('"yes"', '"no"') if '"yes"' in first else first.replace('"no"', '"yes"')
    path.write_text(f"{path.read_text()}{other}\n")
    with pytest.raises(ValueError, match="has both labels, yes and no"):
        Pope().load(tmp_path, Options())
