"""MM-Vet: the question as it stands, one grade for each answer, and means by ability."""

import json

import pytest
from toy_eval_data import load, png, reds, write_images, write_json, write_lines, write_table
from toy_judge import serve

from llava_lite.eval.benchmarks.mmvet import read_grade, to_prompt

RECORDS = {
    "v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]},
    "v1_1": {"imagename": "v1_1.png", "question": "What animal?", "answer": "a cat", "capability": ["rec"]},
}


def write(directory, with_lines=True):
    """Write the files of MM-Vet, with LLaVA's file of questions."""
    write_images(directory / "images", v1_0=10, v1_1=20)
    write_json(directory / "mm-vet.json", RECORDS)
    if with_lines:
        lines = [
            {"question_id": int(k[3:]), "image": r["imagename"], "text": r["question"]} for k, r in RECORDS.items()
        ]
        write_lines(directory / "llava-mm-vet.jsonl", lines)


@pytest.mark.parametrize("with_lines", [True, False])
def test_questions_are_asked_as_they_stand(tmp_path, with_lines):
    write(tmp_path, with_lines)
    benchmark, _, questions = load("mmvet", tmp_path)
    assert [(q.id, q.text, q.truth) for q in questions] == [
        (0, "What is x?", ("-1<AND>-5", ("math", "ocr"))),
        (1, "What animal?", ("a cat", ("rec",))),
    ]
    assert [reds(question) for question in questions] == [[10], [20]]
    assert benchmark.max_new_tokens == 1024


def test_answers_are_written_for_its_graders(tmp_path):
    write(tmp_path)
    benchmark, options, questions = load("mmvet", tmp_path)
    (path,) = benchmark.write(tmp_path / "out", questions, ["-1", "a cat"], options)
    assert json.loads(path.read_text()) == {"v1_0": "-1", "v1_1": "a cat"}
    scores = benchmark.score(questions, ["-1", "a cat"], options)
    assert scores.main is None
    assert "--judge" in scores.notes[0]


def test_judge_completes_the_last_line_of_a_table(tmp_path):
    write(tmp_path)
    _, _, questions = load("mmvet", tmp_path)
    lines = to_prompt(questions[0], "x is\n-1").splitlines()
    assert lines[-1] == "What is x? | -1 <AND> -5 | x is -1 | "
    assert len([line for line in lines if line.count(" | ") == 3]) == 10


def test_scores_are_those_of_a_person(tmp_path):
    write(tmp_path)
    with serve(lambda r: "0.5" if "x is" in r["messages"][0]["content"] else "1.0 (right)") as server:
        benchmark, options, questions = load("mmvet", tmp_path, judge=server.address, out=str(tmp_path / "out"))
        scores = benchmark.score(questions, ["x is -1", "a cat"], options)
    first = server.requests[0]
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("gpt-4-0613", 0, 3)
    assert (scores.main, scores.each) == (75, [0.5, 1])
    assert scores.table == {"rec": 100, "ocr": 50, "math": 50, "math+ocr": 50, "rec alone": 100}
    assert scores.notes == ("Judged by gpt-4-0613 at 127.0.0.1.",)


def test_answer_without_a_grade_is_graded_again_and_then_0(tmp_path):
    write(tmp_path)
    with serve(lambda r: "Well" if "a cat | a cat | " in r["messages"][0]["content"] else "1") as server:
        benchmark, options, questions = load("mmvet", tmp_path, judge=server.address, out=str(tmp_path / "out"))
        scores = benchmark.score(questions, ["-1", "a cat"], options)
    assert scores.each == [1, 0]
    assert [request["temperature"] for request in server.requests] == [0, 0, 0.5, 1, 1.5, 2, 2]
    assert server.prompts[2].endswith("\nAnswer with the figure alone.")
    assert scores.notes[1] == "1 of 2 answers got no grade in 6 tries and count as 0."


@pytest.mark.parametrize(
    ("content", "grade"),
    [("0.3", 0.3), (" 1.0 yes", 1), ("0", 0), ("1.1", None), ("", None), ("good", None), ("nan", None)],
)
def test_grade_is_the_first_word(content, grade):
    assert read_grade(content) == grade


def test_table_of_hugging_face_gives_the_same_questions(tmp_path):
    write(tmp_path / "own")
    rows = [
        {
            "question_id": name,
            "question": record["question"],
            "answer": record["answer"],
            "capability": ",".join(record["capability"]),
            "image": png(colour),
        }
        for (name, record), colour in zip(RECORDS.items(), (10, 20), strict=True)
    ]
    write_table(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", rows)
    own, hub = load("mmvet", tmp_path / "own")[2], load("mmvet", tmp_path / "hub")[2]
    assert [q._replace(images=()) for q in hub] == [q._replace(images=()) for q in own]
    assert [reds(question) for question in hub] == [[10], [20]]


def test_what_is_missing_or_does_not_fit_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MM-Vet needs files[^$]*mm-vet.json[^$]*images"):
        load("mmvet", tmp_path)
    write(tmp_path)
    line = {"question_id": 0, "image": "v1_0.png", "text": "What is x?"}
    for other in ({"image": "v1_1.png"}, {"text": "What is y?"}):
        write_lines(tmp_path / "llava-mm-vet.jsonl", [line | other])
        with pytest.raises(ValueError, match=r"llava-mm-vet.jsonl: question 0 is .*mm-vet.json has .* under that id"):
            load("mmvet", tmp_path)
    write_lines(tmp_path / "llava-mm-vet.jsonl", [{"question_id": 9, "image": "v1_0.png", "text": "x"}])
    with pytest.raises(ValueError, match=r"llava-mm-vet.jsonl: question 'v1_9' is not in .*mm-vet.json"):
        load("mmvet", tmp_path)
