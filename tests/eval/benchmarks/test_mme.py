"""MME: pairs of yes-or-no questions in fourteen tasks."""

import pytest
import toy_benchmarks as toy

from llava_lite.eval.benchmarks.base import Options
from llava_lite.eval.benchmarks.mme import Mme


def answer_all(questions):
    """Right answers to all questions."""
    return [question.truth.answer for question in questions]


def test_prompts_are_llavas(tmp_path):
    toy.mme(tmp_path)
    questions = Mme().load(tmp_path, Options())
    assert [question.text for question in questions[:2]] == [
        "Is it existence?\nAnswer the question using a single word or phrase.",
        "Is it not existence?\nAnswer the question using a single word or phrase.",
    ]
    release = tmp_path / "MME_Benchmark_release_version"
    assert questions[0].images == (str(release / "existence/0001.png"),)
    # LLaVA's file leaves out that the images of some tasks lie in a directory of their own.
    posters = next(question for question in questions if question.category == "posters")
    assert posters.images == (str(release / "posters/images/0001.png"),)
    assert [question.category for question in questions[::2]] == list(toy.MME_TASKS)


def test_the_release_alone_is_enough(tmp_path):
    toy.mme(tmp_path)
    expected = Mme().load(tmp_path, Options())
    (tmp_path / "llava_mme.jsonl").unlink()
    assert Mme().load(tmp_path, Options()) == expected


def test_perception_is_the_sum_of_ten_tasks(tmp_path):
    toy.mme(tmp_path)
    benchmark = Mme()
    questions = benchmark.load(tmp_path, Options())
    answers = answer_all(questions)
    scores = benchmark.score(questions, answers, Options())
    assert (scores.main, scores.table["cognition, of 800"]) == (2000, 800)
    assert scores.interval == (2000, 2000)
    # One of two: accuracy 50, accuracy+ 0. Neither yes nor no is wrong.
    answers[0], answers[-1] = "No", "maybe"
    scores = benchmark.score(questions, answers, Options())
    assert (scores.main, scores.table["cognition, of 800"]) == (1850, 650)
    assert (scores.table["existence"], scores.table["count"]) == (50, 200)
    assert (scores.table["existence: accuracy"], scores.table["existence: accuracy+"]) == (50, 0)
    assert scores.each == [0, *[1] * 26, 0]


def test_a_limit_leaves_out_halves_of_pairs_and_sums_that_are_not_complete(tmp_path):
    toy.mme(tmp_path)
    benchmark = Mme()
    questions = benchmark.load(tmp_path, Options())[:21]
    scores = benchmark.score(questions, answer_all(questions), Options())
    assert scores.main == 2000
    assert "cognition, of 800" not in scores.table
    missing = "commonsense_reasoning, numerical_calculation, text_translation, code_reasoning"
    assert scores.notes == (
        "1 question without the other one of its image is left out.",
        f"Not asked: {missing}. A sum is given where all its tasks were asked.",
    )
    few = benchmark.score(questions[:3], answer_all(questions[:3]), Options())
    assert (few.main, few.interval, few.table["existence"]) == (None, None, 200)


def test_answers_are_written_for_the_official_tool(tmp_path):
    toy.mme(tmp_path)
    toy.mme_table(tmp_path / "table")
    for directory in (tmp_path, tmp_path / "table"):
        questions = Mme().load(directory, Options())
        paths = Mme().write(tmp_path / "out", questions, ["Yes\tor\nno"] * len(questions), Options())
        assert [path.name for path in paths] == [f"{task}.txt" for task in toy.MME_TASKS]
        assert paths[0].read_text() == (
            "0001.txt\tIs it existence? Please answer yes or no.\tYes\tYes or no\n"
            "0001.txt\tIs it not existence?  Please answer yes or no.\tNo\tYes or no\n"
        )


def test_a_question_of_another_release_is_refused(tmp_path):
    toy.mme(tmp_path)
    path = tmp_path / "llava_mme.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace("Is it not count?", "Is it uncountable?"))
    with pytest.raises(ValueError, match=r"question 'count/0001\.png', 'Is it uncountable\?', is not in .*count"):
        Mme().load(tmp_path, Options())
    path.write_text("".join(whole.splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match="image '0001' of the task existence has answers to 1 question"):
        Mme().load(tmp_path, Options())


def test_a_broken_line_of_the_release_is_shown(tmp_path):
    toy.mme(tmp_path)
    path = tmp_path / "MME_Benchmark_release_version/count/0001.txt"
    path.write_text("Is it?\tperhaps\n")
    with pytest.raises(ValueError, match=r"0001\.txt, line 1 is .*; expected a question, a TAB, and Yes or No"):
        Mme().load(tmp_path, Options())
