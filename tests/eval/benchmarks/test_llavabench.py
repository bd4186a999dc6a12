"""LLaVA-Bench: the question as it stands, the judge's blocks, and the ratio of two sums."""

import json

import pytest
from toy_eval_data import load, png, reds, write_images, write_lines, write_table
from toy_judge import serve

from llava_lite.eval.benchmarks.llavabench import read_figures, to_prompt

QUESTIONS = [
    {"question_id": 0, "image": "001.png", "text": "What is it?", "category": "conv"},
    {"question_id": 1, "image": "002.png", "text": "Describe it.", "category": "detail"},
    {"question_id": 2, "image": "002.png", "text": "Why?", "category": "complex"},
]
CAPTIONS = {"001.png": "A cat.", "002.png": "A red bus."}


def write(directory, references=(2, 0, 1)):
    """Write the files of LLaVA-Bench; the answers of GPT-4 stand in another order."""
    write_images(directory / "images", **{"001": 10, "002": 20})
    write_lines(directory / "questions.jsonl", QUESTIONS)
    write_lines(
        directory / "context.jsonl", [{"id": i, "image": k, "caption": v} for i, (k, v) in enumerate(CAPTIONS.items())]
    )
    write_lines(directory / "answers_gpt4.jsonl", [{"question_id": i, "text": f"reference {i}"} for i in references])


def test_questions_are_asked_as_they_stand(tmp_path):
    write(tmp_path)
    benchmark, _, questions = load("llavabench", tmp_path)
    assert [(q.text, q.category, q.truth) for q in questions] == [
        ("What is it?", "conv", ("A cat.", "reference 0")),
        ("Describe it.", "detail", ("A red bus.", "reference 1")),
        ("Why?", "complex", ("A red bus.", "reference 2")),
    ]
    assert [reds(question) for question in questions] == [[10], [20], [20]]
    assert benchmark.max_new_tokens == 1024


def test_without_a_judge_there_is_no_score(tmp_path):
    write(tmp_path)
    benchmark, options, questions = load("llavabench", tmp_path)
    scores = benchmark.score(questions, ["a", "b", "c"], options)
    assert scores.main is None
    assert "--judge" in scores.notes[0]


def test_judge_reads_the_blocks_in_llavas_order(tmp_path):
    write(tmp_path)
    _, _, questions = load("llavabench", tmp_path)
    assert to_prompt(questions[0], "my answer").startswith(
        "[Context]\nA cat.\n\n[Question]\nWhat is it?\n\n[Assistant 1]\nreference 0\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nmy answer\n\n[End of Assistant 2]\n\n[System]\n"
    )


def test_score_is_the_ratio_of_sums(tmp_path):
    write(tmp_path)
    figures = {"What is it?": "8 6\nbecause", "Describe it.": "10, 5\n", "Why?": "I like both"}

    def answer(request):
        return next(text for question, text in figures.items() if question in request["messages"][1]["content"])

    with serve(answer) as server:
        benchmark, options, questions = load("llavabench", tmp_path, judge=server.address, out=str(tmp_path / "out"))
        scores = benchmark.score(questions, ["a", "b", "c"], options)
        first = server.requests[0]
        assert (first["model"], first["temperature"], first["max_tokens"]) == ("gpt-4-0314", 0.2, 1024)
        assert [message["role"] for message in first["messages"]] == ["system", "user"]
        # The third one was asked three times in all, and nothing twice by the next run.
        assert len(server.requests) == 5
        assert benchmark.score(questions, ["a", "b", "c"], options).main == scores.main
        assert len(server.requests) == 5
    # (6 + 5) / (8 + 10)
    assert scores.main == pytest.approx(100 * 11 / 18)
    assert scores.table == {
        "conv": 75,
        "detail": 50,
        "GPT-4's answers, of 100": 90,
        "the model's answers, of 100": 55,
    }
    assert scores.each == [0.6, 0.5, None]
    assert scores.notes == (
        "Judged by gpt-4-0314 at 127.0.0.1.",
        "1 of 3 reviews hold no two figures and are left out.",
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "reviews.jsonl").read_text().splitlines()]
    assert [line["tuple"] for line in lines] == [[8, 6], [10, 5], None]


def test_another_judge_is_named_as_not_the_papers(tmp_path):
    write(tmp_path)
    with serve(lambda request: "5 5") as server:
        benchmark, options, questions = load(
            "llavabench", tmp_path, judge=server.address, judge_model="toy", out=str(tmp_path)
        )
        scores = benchmark.score(questions, ["a", "b", "c"], options)
    assert scores.main == 100
    assert scores.interval == (100, 100)
    assert scores.notes == ("Judged by toy at 127.0.0.1, not by the paper's gpt-4-0314: do not compare the two.",)


@pytest.mark.parametrize(
    ("content", "figures"),
    [
        ("8 7", [8, 7]),
        ("8,7.5\nx", [8, 7.5]),
        ("\n9 9", [9, 9]),
        ("8", None),
        ("8 7 6", None),
        ("Assistant 1: 8", None),
    ],
)
def test_figures_stand_on_the_first_line(content, figures):
    assert read_figures(content) == figures


def test_table_of_hugging_face_gives_the_same_questions(tmp_path):
    write(tmp_path / "own")
    rows = [
        {
            "question_id": item["question_id"],
            "question": item["text"],
            "category": item["category"],
            "caption": CAPTIONS[item["image"]],
            "gpt_answer": f"reference {item['question_id']}",
            "image": png(int(item["image"][2]) * 10),
        }
        for item in QUESTIONS
    ]
    write_table(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", rows)
    own, hub = load("llavabench", tmp_path / "own")[2], load("llavabench", tmp_path / "hub")[2]
    assert [q._replace(images=()) for q in hub] == [q._replace(images=()) for q in own]
    assert [reds(question) for question in hub] == [[10], [20], [20]]


def test_what_is_missing_or_does_not_fit_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"LLaVA-Bench \(wild\) needs files[^$]*questions.jsonl[^$]*images"):
        load("llavabench", tmp_path)
    write(tmp_path, references=(0, 1))
    with pytest.raises(
        ValueError, match=r"questions.jsonl: question '2' is not in .*answers_gpt4.jsonl. Both files must be"
    ):
        load("llavabench", tmp_path)
