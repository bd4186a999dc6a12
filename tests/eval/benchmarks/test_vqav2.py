"""VQAv2: val is scored, the test parts are written for the server."""

import json
import re

import pytest
import toy_benchmarks as toy

from llava_lite.eval.benchmarks.base import Options
from llava_lite.eval.benchmarks.vqav2 import VqaV2

VAL, TEST_DEV, TEST = Options("val"), Options("test-dev"), Options("test")


def test_prompts_of_val_end_as_llavas(tmp_path):
    toy.vqav2(tmp_path)
    questions = VqaV2().load(tmp_path, VAL)
    assert questions[0].text == "Is the ball red?\nAnswer the question using a single word or phrase."
    assert questions[0].images == (str(tmp_path / "val2014/COCO_val2014_000000000042.jpg"),)
    assert [(question.id, question.truth[0]) for question in questions] == [
        (42000, "yes/no"),
        (42001, "number"),
        (43000, "other"),
    ]


def test_val_is_scored_by_soft_accuracy_for_each_type(tmp_path):
    toy.vqav2(tmp_path)
    questions = VqaV2().load(tmp_path, VAL)
    # no: 2 of 10; two: 2 of 10; 9 of 10 said "black / white", whose stroke is deleted.
    scores = VqaV2().score(questions, ["No", "two", "black white"], VAL)
    assert scores.each == pytest.approx([0.6, 0.6, 1])
    assert scores.main == pytest.approx(100 * 2.2 / 3)
    assert scores.table == pytest.approx({"yes/no": 60, "number": 60, "other": 100})
    assert scores.notes == ("This is val; the figures of papers are test-dev.",)
    assert VqaV2().write(tmp_path, questions, ["x"] * 3, VAL) == []


def test_upload_has_an_entry_for_every_id_of_test2015(tmp_path):
    toy.vqav2(tmp_path)
    benchmark = VqaV2()
    questions = benchmark.load(tmp_path, TEST_DEV)
    assert [question.id for question in questions] == [1, 2]
    assert questions[0].text == "Is it day?\nAnswer the question using a single word or phrase."
    (path,) = benchmark.write(tmp_path / "out", questions, ["Yes.", "two dogs"], TEST_DEV)
    assert path.name == "vqav2_test-dev_upload.json"
    assert json.loads(path.read_text()) == [
        {"question_id": 1, "answer": "yes"},
        {"question_id": 2, "answer": "2 dogs"},
        {"question_id": 3, "answer": ""},
    ]
    scores = benchmark.score(questions, ["Yes.", "two dogs"], TEST_DEV)
    assert scores.main is None
    assert scores.notes == ("Upload the file to https://eval.ai/web/challenges/challenge-page/830, which scores it.",)
    assert benchmark.score_one(questions[0], "yes") is None


def test_upload_of_tables_is_that_of_files(tmp_path):
    toy.vqav2(tmp_path / "files")
    toy.vqav2_table(tmp_path / "table")
    uploads = []
    for name in ("files", "table"):
        benchmark = VqaV2()
        questions = benchmark.load(tmp_path / name, TEST_DEV)
        (path,) = benchmark.write(tmp_path / f"{name}_out", questions, ["a cat", "b"], TEST_DEV)
        uploads.append(path.read_text())
    assert uploads[0] == uploads[1]


def test_a_question_without_truth_or_place_in_the_upload_is_refused(tmp_path):
    toy.vqav2(tmp_path)
    path = tmp_path / "v2_mscoco_val2014_annotations.json"
    path.write_text(path.read_text().replace("42001", "42009"))
    with pytest.raises(ValueError, match=r"question 42001 is not in .*annotations\.json"):
        VqaV2().load(tmp_path, VAL)
    path = tmp_path / "llava_vqav2_mscoco_test2015.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=r"question 1 is not in .*test2015\.jsonl"):
        VqaV2().load(tmp_path, TEST_DEV)


def test_what_a_test_part_needs_is_listed(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        VqaV2().load(tmp_path, TEST)
    for name in ("llava_vqav2_mscoco_test2015.jsonl", "llava_vqav2_mscoco_test-dev2015.jsonl", "test2015"):
        assert f"  {tmp_path / name}    from " in str(caught.value)


def test_another_file_of_questions_is_scored_on_val(tmp_path):
    toy.vqav2(tmp_path)
    line = {"question_id": 43000, "image": "COCO_val2014_000000000043.jpg", "text": "What?", "category": "default"}
    toy.write_lines(tmp_path / "mine.jsonl", [line])
    (question,) = VqaV2().load(tmp_path, VAL._replace(questions="mine.jsonl"))
    assert (question.text, question.truth[0]) == ("What?", "other")


def test_ids_may_be_written_as_texts(tmp_path):
    toy.vqav2(tmp_path)
    expected = {one: VqaV2().load(tmp_path, one) for one in (VAL, TEST_DEV)}
    for name in ("v2_OpenEnded_mscoco_val2014_questions.json", "llava_vqav2_mscoco_test-dev2015.jsonl"):
        path = tmp_path / name
        path.write_text(re.sub(r'"question_id": (\d+)', r'"question_id": "\1"', path.read_text()))
        assert '"question_id": "' in path.read_text()
    for options, questions in expected.items():
        assert VqaV2().load(tmp_path, options) == questions
    path.write_text(path.read_text().replace('"question_id": "1"', '"question_id": "first"'))
    with pytest.raises(ValueError, match=r"test-dev2015\.jsonl: the question_id 'first' is no number"):
        VqaV2().load(tmp_path, TEST_DEV)


def test_a_question_about_another_image_is_refused(tmp_path):
    toy.vqav2(tmp_path)
    line = {"question_id": 42000, "image": "COCO_val2014_000000000043.jpg", "text": "Is the ball red?"}
    toy.write_lines(tmp_path / "mine.jsonl", [line])
    with pytest.raises(ValueError, match=r"question 42000 is about .*043\.jpg, and .*042\.jpg under that id"):
        VqaV2().load(tmp_path, VAL._replace(questions="mine.jsonl"))
