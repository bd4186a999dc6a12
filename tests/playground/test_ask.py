"""Asking a stage the held-out questions."""

import json

import pytest
from PIL import Image

pytest.importorskip("sklearn", reason="the tiny world is drawn from scikit-learn's digits: pip install scikit-learn")

from playground.tiny import ask

RECORDS = [
    {"kind": "digit", "image": "a.png", "question": "Which digit is top-left?", "answer": "3"},
    {"kind": "caption", "image": "b.png", "question": "Describe the picture.", "answer": "red 3 top-left."},
    {"kind": "digit", "image": "c.png", "question": "Which digit is top-right?", "answer": "4"},
    {"kind": "text", "image": None, "question": "What is 1 plus 1?", "answer": "2"},
]


def test_batches_hold_one_kind_and_every_record_once():
    batches = ask.batches(RECORDS * 5, size=4)
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 1, 4, 1]
    assert all(len({record["kind"] for record in batch}) == 1 for batch in batches)


def test_images_are_found_beside_the_questions(tmp_path):
    (tmp_path / "questions.json").write_text(json.dumps(RECORDS))
    assert [record["image"] for record in ask.read_questions(tmp_path)] == [
        str(tmp_path / "a.png"),
        str(tmp_path / "b.png"),
        str(tmp_path / "c.png"),
        None,
    ]


def test_accuracy_is_the_fraction_of_exact_answers_by_kind():
    output = ["3", "red 3 top-left.", "9", "2"]
    blank = ["1", None, "4", None]
    asked = [{**r, "with_image": p, "blank": b} for r, p, b in zip(RECORDS, output, blank, strict=True)]
    assert ask.accuracy(asked) == {"digit": 0.5, "caption": 1.0, "text": 1.0}
    assert ask.accuracy(asked, "blank") == {"digit": 0.5}


def test_each_question_is_asked_with_its_image_and_then_with_a_blank_one(monkeypatch):
    calls = []

    def reply(model, processor, questions, images, conv_template, max_new_tokens):
        assert conv_template == "v1"
        calls.append((tuple(questions), images))
        return [" 3 " if image == "a.png" else "7" for image in images]

    monkeypatch.setattr(ask, "reply", reply)
    asked = {record["question"]: record for record in ask.ask(None, None, RECORDS)}
    assert len(asked) == len(RECORDS)
    digit, caption = asked["Which digit is top-left?"], asked["Describe the picture."]
    assert (digit["with_image"], digit["blank"]) == ("3", "7")
    assert (caption["with_image"], caption["blank"]) == ("7", None)
    empty_images = [image for _, images in calls for image in images if isinstance(image, Image.Image)]
    assert len(empty_images) == 2
    assert all(image.size == (56, 56) and image.getextrema() == ((0, 0),) * 3 for image in empty_images)


def test_a_sound_is_asked_about_alone_and_in_the_template_of_its_system(monkeypatch):
    calls = []

    def reply(model, processor, question, media, conv_template, max_new_tokens):
        calls.append((question, media, conv_template))
        return " 4"

    monkeypatch.setattr(ask, "reply", reply)
    record = {"kind": "sound", "image": None, "sound": "a.wav", "question": "Which digit is there?", "answer": "4"}
    (asked,) = ask.ask(None, None, [record], template="alpaca")
    assert calls == [("Which digit is there?", {"audio": "a.wav"}, "alpaca")]
    assert (asked["with_image"], asked["blank"]) == ("4", None)


def test_sounds_are_found_beside_the_questions(tmp_path):
    (tmp_path / "questions.json").write_text(json.dumps([{"image": None, "sound": "sounds/0.wav"}]))
    assert ask.read_questions(tmp_path) == [{"image": None, "sound": str(tmp_path / "sounds/0.wav")}]
