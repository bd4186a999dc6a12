"""DocVQA: its prompt, the mean ANLS, and the file of its server."""

import json

import pytest
from toy_eval_data import load, png, reds, write_images, write_json, write_table

SHORT = "\nAnswer the question using a single word or phrase."
RECORDS = [
    {
        "questionId": 49153,
        "question": "What is the date?",
        "image": "documents/a.png",
        "answers": ["jan 5", "January 5"],
    },
    {"questionId": 24580, "question": "Who signs?", "image": "documents/b.png", "answers": ["hello"]},
]


def write(
    directory, name="val_v1.0_withQT.json", images="documents", keys=("questionId", "question", "image", "answers")
):
    """Write the files of DocVQA's server."""
    write_images(directory / images, a=10, b=20)
    write_json(directory / name, {"data": [{key: record[key] for key in keys} for record in RECORDS]})


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("val_v1.0_withQT.json", "documents"),
        ("val_v1.0.json", "documents"),
        ("spdocvqa_qas/val_v1.0_withQT.json", "spdocvqa_images"),
    ],
)
def test_questions_are_asked_for_a_word_or_phrase(tmp_path, name, images):
    write(tmp_path, name, images)
    _, _, questions = load("docvqa", tmp_path)
    assert [(q.id, q.text, q.truth) for q in questions] == [
        (49153, "What is the date?" + SHORT, ("jan 5", "January 5")),
        (24580, "Who signs?" + SHORT, ("hello",)),
    ]
    assert [reds(question) for question in questions] == [[10], [20]]


def test_score_is_the_mean_anls_for_the_nearest_answer(tmp_path):
    write(tmp_path)
    benchmark, options, questions = load("docvqa", tmp_path)
    # One of five letters is missing: 0.8.
    scores = benchmark.score(questions, ["Jan  5", "helo"], options)
    assert scores.each == pytest.approx([1, 0.8])
    assert scores.main == pytest.approx(90)
    assert scores.table == {"exactly right": 50}


def test_upload_is_a_list_of_ids_and_answers(tmp_path):
    write(tmp_path, "test_v1.0.json", keys=("questionId", "question", "image"))
    benchmark, options, questions = load("docvqa", tmp_path, "test")
    (path,) = benchmark.write(tmp_path / "out", questions, ["5 Jan", "I. Ü."], options)
    assert path.name == "docvqa_test_upload.json"
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"questionId": 49153, "answer": "5 Jan"},
        {"questionId": 24580, "answer": "I. Ü."},
    ]
    scores = benchmark.score(questions, ["", ""], options)
    assert scores.main is None
    assert scores.notes == ("The answers of this split are not public: upload to https://rrc.cvc.uab.es/?ch=17",)


def test_table_of_hugging_face_gives_the_same_questions(tmp_path):
    write(tmp_path / "own")
    rows = [
        {"questionId": str(r["questionId"]), "question": r["question"], "answers": r["answers"], "image": png(colour)}
        for r, colour in zip(RECORDS, (10, 20), strict=True)
    ]
    write_table(tmp_path / "hub" / "DocVQA" / "validation-00000-of-00001.parquet", rows)
    write_table(tmp_path / "hub" / "InfographicVQA" / "validation-00000-of-00001.parquet", rows[:1])
    own, hub = load("docvqa", tmp_path / "own")[2], load("docvqa", tmp_path / "hub")[2]
    assert [q._replace(images=()) for q in hub] == [q._replace(images=()) for q in own]
    assert [reds(question) for question in hub] == [[10], [20]]


def test_what_is_missing_or_wrong_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"DocVQA needs files[^$]*val_v1.0_withQT.json    from https://rrc"):
        load("docvqa", tmp_path)
    write_json(tmp_path / "val_v1.0.json", [])
    with pytest.raises(ValueError, match=r"val_v1.0.json has no list 'data' of questions"):
        load("docvqa", tmp_path)
