"""TextVQA: with LLaVA's OCR tokens and without."""

import json

import pytest
import toy_benchmarks as toy

from llava_lite.eval.benchmarks.base import Options
from llava_lite.eval.benchmarks.textvqa import TextVqa

ENDING = "\nAnswer the question using a single word or phrase."


def test_prompts_are_llavas(tmp_path):
    toy.textvqa(tmp_path)
    questions = TextVqa().load(tmp_path, Options(variant="ocr"))
    assert [question.text for question in questions] == [
        f"what is the brand?\nReference OCR token: DELL, XPS{ENDING}",
        f"What year is it?{ENDING}",
        f"how many letters?\nReference OCR token: DELL, XPS{ENDING}",
    ]
    # LLaVA's ids are those of the images.
    assert [question.id for question in questions] == ["0a1", "0a2", "0a1"]
    assert questions[1].images == (str(tmp_path / "train_images/0a2.jpg"),)


def test_without_ocr_the_tokens_are_left_out(tmp_path):
    toy.textvqa(tmp_path)
    options = Options(variant="no_ocr")
    questions = TextVqa().load(tmp_path, options)
    assert [question.text for question in questions] == [text + ENDING for _, text, _, _ in toy.TEXTVQA]
    scores = TextVqa().score(questions, ["x"] * 3, options)
    assert scores.notes == ("Asked without OCR tokens; the figures of papers are with them.",)


def test_score_is_the_mean_soft_accuracy(tmp_path):
    toy.textvqa(tmp_path)
    options = Options(variant="ocr")
    questions = TextVqa().load(tmp_path, options)
    # "DELL." is dell as 9 of 10 said; 2014 said one; "Four" is 4 as two said.
    scores = TextVqa().score(questions, ["DELL.", "2014", "Four"], options)
    assert scores.each == pytest.approx([1, 0.3, 0.6])
    assert scores.main == pytest.approx(100 * 1.9 / 3)
    assert scores.notes == ()


def test_a_question_of_another_release_is_refused(tmp_path):
    toy.textvqa(tmp_path)
    path = tmp_path / "TextVQA_0.5.1_val.json"
    found = json.loads(path.read_text())
    found["data"][1]["question"] = "what day is it?"
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"question \('0a2', 'what year is it\?'\) is not in .*val\.json"):
        TextVqa().load(tmp_path, Options(variant="ocr"))


def test_a_line_that_is_no_question_is_shown(tmp_path):
    toy.textvqa(tmp_path)
    path = tmp_path / "llava_textvqa_val_v051_ocr.jsonl"
    path.write_text(path.read_text().replace("What year is it?", "What year\\nis it?"))
    with pytest.raises(ValueError, match="is no question of LLaVA's TextVQA"):
        TextVqa().load(tmp_path, Options(variant="ocr"))
