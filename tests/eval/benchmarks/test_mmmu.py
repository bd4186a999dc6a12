"""MMMU: the prompts of its own code for LLaVA-1.5, letters drawn at random, and tables by subject and domain."""

import json
import random

import pytest
from toy_eval_data import load, png, reds, write_json, write_table

from llava_lite.eval.scoring.mmmu import SUBJECTS

LETTER = "\n\nAnswer with the option's letter from the given choices directly."
SHORT = "\nAnswer the question using a single word or phrase."


def row(subject, number, question="What is in <image 1>?", options="['red', 'it\\'s blue']", answer="B", **more):
    """Return a row of the hub's tables."""
    kind = "multiple-choice" if options != "[]" else "open"
    found = {"id": f"validation_{subject}_{number}", "question": question, "options": options, "answer": answer}
    return found | {"question_type": kind, "image_1": png(10), "image_2": png(20)} | more


def write(directory, **rows_of):
    """Write a table of every subject; of those that are not named one question."""
    for subject in SUBJECTS:
        rows = rows_of.get(subject, [row(subject, 1)])
        path = directory / subject / "validation-00000-of-00001.parquet"
        write_table(path, rows, ("image_1", "image_2"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A directory with 32 questions: two of Accounting more, one of them open with two truths."""
    directory = tmp_path_factory.mktemp("mmmu")
    more = [
        row("Accounting", 1),
        row("Accounting", 2, "Which <image 2>?", "['a', 'b', 'c']", "C"),
        row("Accounting", 3, "How much?", "[]", "['24/7', '3.429']"),
    ]
    write(directory, Accounting=more)
    return directory


def test_prompts_are_those_of_mmmus_code_and_the_first_image_is_shown(data):
    _, _, questions = load("mmmu", data)
    assert [question.id for question in questions[:4]] == [
        "validation_Accounting_1",
        "validation_Accounting_2",
        "validation_Accounting_3",
        "validation_Agriculture_1",
    ]
    assert questions[0].text == "What is in <image 1>?\n(A) red\n(B) it's blue" + LETTER
    assert questions[1].text == "Which <image 2>?\n(A) a\n(B) b\n(C) c" + LETTER
    assert questions[2].text == "How much?" + SHORT
    assert questions[2].truth.answer == ["24/7", "3.429"]
    assert [question.category for question in questions[3:]] == sorted(SUBJECTS)[1:]
    assert all(reds(question) == [10] for question in questions)


def test_default_is_greedy_and_flagperf_samples_with_beams(data):
    benchmark, options, _ = load("mmmu", data)
    assert benchmark.generation(options) == {"image_aspect_ratio": "square"}
    benchmark, options, _ = load("mmmu", data, variant="flagperf")
    sampling = benchmark.generation(options)
    assert (sampling["temperature"], sampling["num_beams"], sampling["seed"]) == (1.0, 5, 42)
    assert sampling["image_aspect_ratio"] == "square"
    assert benchmark.max_new_tokens == 128


def test_scores_are_those_of_a_person(data):
    benchmark, options, questions = load("mmmu", data)
    answers = ["(B)", "C", "it is 3.43", *["A"] * 29]
    scores = benchmark.score(questions, answers, options)
    assert scores.main == pytest.approx(100 * 3 / 32)
    assert scores.table["Accounting"] == 100
    # Business: 3 of Accounting and 4 of the other subjects.
    assert scores.table["Overall-Business"] == pytest.approx(100 * 3 / 7)
    assert scores.table["Overall-Science"] == 0
    assert "Overall" not in scores.table
    assert len(scores.table) == 30 + 6
    assert scores.notes[0].startswith("0 of 32 answers name no choice")


def test_letters_at_random_come_from_a_generator_of_their_own_and_are_counted(data):
    benchmark, options, questions = load("mmmu", data)
    own = random.Random(42)
    drawn = [own.choice(["A", "B"]), own.choice(["A", "B", "C"])]
    answers = ["no idea", "none", "24/7", *["B"] * 29]
    found = [benchmark.score(questions, answers, options) for _ in range(2)]
    assert found[0].each[:3] == [float(drawn[0] == "B"), float(drawn[1] == "C"), 1.0]
    assert found[0].each == found[1].each
    assert found[0].notes[0].startswith("2 of 32 answers name no choice and were given one at random (seed 42)")
    (path,) = benchmark.write(data / "out", questions, answers, options)
    assert path.name == "total_val_output.json"
    written = json.loads(path.read_text())
    assert list(written.items())[:3] == [
        ("validation_Accounting_1", drawn[0]),
        ("validation_Accounting_2", drawn[1]),
        ("validation_Accounting_3", "24/7"),
    ]
    # For the running score an answer without a letter is wrong.
    assert [benchmark.score_one(q, a) for q, a in zip(questions[:4], answers, strict=False)] == [0, 0, 1, 1]


def test_truths_of_the_official_program_are_taken_where_they_are_there(tmp_path):
    write(tmp_path)
    write_json(tmp_path / "answer_dict_val.json", {"validation_Art_1": {"question_type": "x", "ground_truth": "A"}})
    truths = {question.id: question.truth.answer for question in load("mmmu", tmp_path)[2]}
    assert (truths["validation_Art_1"], truths["validation_Design_1"]) == ("A", "B")


def test_what_is_missing_or_wrong_is_said(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"MMMU needs files .*\n.*Accounting/validation-00000-of-00001.parquet"
    ):
        load("mmmu", tmp_path)
    path = tmp_path / "Accounting" / "validation-00000-of-00001.parquet"
    write_table(path, [row("Accounting", 1)], ("image_1", "image_2"))
    with pytest.raises(
        FileNotFoundError, match="has no table of Agriculture/validation; it has Accounting/validation"
    ):
        load("mmmu", tmp_path)
    write_table(path, [row("Accounting", 1, options="red")], ("image_1", "image_2"))
    with pytest.raises(
        ValueError, match=r"'validation_Accounting_1' has the options 'red'; expected the text of a list"
    ):
        load("mmmu", tmp_path)
