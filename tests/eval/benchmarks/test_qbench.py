"""Q-Bench: the prompt of MoE-LLaVA's program, letters of the dev split, and records with responses."""

import json

import pytest
from toy_eval_data import load, png, reds, write_images, write_json, write_table

CHOOSE = "\nChoose between one of the options as follows:\n"
RECORDS = [
    {"img_path": "a.png", "question": "Is it sharp?", "candidates": ["Yes", "No"], "correct_ans": "No"},
    {
        "img_path": "b.png",
        "question": "How bright?",
        "candidates": ["Dark", "Bright", "Medium"],
        "correct_ans": "Dark",
    },
]


def write(directory, split="dev", images="images_llvisionqa"):
    """Write the files of Q-Bench; the test split has no answers."""
    write_images(directory / images, a=10, b=20)
    kept = [{k: v for k, v in record.items() if split == "dev" or k != "correct_ans"} for record in RECORDS]
    write_json(directory / f"llvisionqa_{split}.json", kept)


@pytest.mark.parametrize("images", ["images_llvisionqa", "images_llviqionqa"])
def test_prompt_is_that_of_moe_llava(tmp_path, images):
    write(tmp_path, images=images)
    benchmark, options, questions = load("qbench", tmp_path)
    assert [question.text for question in questions] == [
        f"Is it sharp?{CHOOSE}A. Yes\nB. No\n",
        f"How bright?{CHOOSE}A. Dark\nB. Bright\nC. Medium\n",
    ]
    assert [reds(question) for question in questions] == [[10], [20]]
    assert benchmark.generation(options) == {"image_aspect_ratio": "square"}


def test_dev_split_is_scored_without_guesses(tmp_path):
    write(tmp_path)
    benchmark, options, questions = load("qbench", tmp_path)
    scores = benchmark.score(questions, ["B. No", "I cannot say."], options)
    assert (scores.main, scores.each) == (50, [1, 0])
    assert scores.notes == ("1 of 2 answers name no letter and are wrong.",)


def test_answers_are_written_into_the_records_one_a_line(tmp_path):
    write(tmp_path, "test")
    benchmark, options, questions = load("qbench", tmp_path, "test")
    (path,) = benchmark.write(tmp_path / "out", questions, ["B", "A"], options)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[1] == {
        "img_path": "b.png",
        "question": "How bright?",
        "candidates": ["Dark", "Bright", "Medium"],
        "response": "A",
    }
    assert benchmark.score(questions, ["B", "A"], options).main is None


def test_table_of_hugging_face_gives_the_same_questions(tmp_path):
    write(tmp_path / "own")
    rows = [
        {
            "question": record["question"],
            **{f"option{i}": (record["candidates"] + ["N/A"] * 2)[i] for i in range(4)},
            "correct_choice": "BA"[number],
            "image": png(10 * (number + 1)),
        }
        for number, record in enumerate([RECORDS[0] | {"candidates": ["Yes", "No"]}, RECORDS[1]])
    ]
    write_table(tmp_path / "hub" / "data" / "dev-00000-of-00001.parquet", rows)
    own = load("qbench", tmp_path / "own")[2]
    benchmark, options, hub = load("qbench", tmp_path / "hub")
    assert [(q.text, q.truth[:2]) for q in hub] == [(q.text, q.truth[:2]) for q in own]
    assert benchmark.score(hub, ["B", "A"], options).main == 100
    write_table(tmp_path / "wrong" / "dev-00000-of-00001.parquet", [rows[0] | {"correct_choice": "C"}])
    with pytest.raises(ValueError, match="row 0: the right choice is 'C'; expected one of A, B"):
        load("qbench", tmp_path / "wrong")


def test_what_is_missing_or_wrong_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Q-Bench needs files[^$]*llvisionqa_dev.json[^$]*images_llvisionqa"):
        load("qbench", tmp_path)
    write(tmp_path)
    write_json(tmp_path / "llvisionqa_dev.json", [RECORDS[0] | {"correct_ans": "Maybe"}])
    with pytest.raises(
        ValueError, match=r"record 0: the right answer 'Maybe' is none of its candidates \['Yes', 'No'\]"
    ):
        load("qbench", tmp_path)
