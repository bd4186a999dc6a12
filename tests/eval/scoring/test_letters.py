"""The letter of a choice by the rules of SEED-Bench, ScienceQA, MMBench and Q-Bench."""

import pytest

from llava_lite.eval.scoring.letters import (
    aggregate_scienceqa,
    aggregate_seed,
    parse_mmbench,
    parse_qbench,
    parse_scienceqa,
    score_mmbench,
    score_qbench,
    score_scienceqa,
    score_seed,
)
from llava_lite.eval.scoring.mmmu import Draws

OPTIONS = {"A": "red car", "B": "blue car", "C": "green", "D": "none of them"}


@pytest.mark.parametrize("answer", ["b", "B.", "(B)", "B ", " B", "B\n", "", "BB", "The answer is B."])
def test_seed_takes_the_bare_letter_alone(answer):
    assert score_seed("B", "B") == 1
    assert score_seed(answer, "B") == 0


def test_seed_is_summed_up_by_kind_and_type():
    table = aggregate_seed([1, 0, 1, 1], ["image", "image", "image", "video"], ["Scene", "Scene", "Text", "Action"])
    assert table == {"total": 0.75, "image": 2 / 3, "video": 1, "Scene": 0.5, "Text": 1, "Action": 1}


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("A", 0),
        ("D", 3),
        ("E", -1),  # Four choices.
        ("B. blue car", 1),
        ("B. ", 1),
        ("B.", -1),
        ("B.blue", -1),
        ("B) blue", -1),
        ("(B)", -1),
        ("b", -1),
        ("b. blue", -1),
        ("B ", -1),
        ("E. none", -1),
        ("F. none", -1),
        ("The answer is C.", 2),
        ("The answer is C", -1),  # A character has to follow.
        ("The answer is C!", 2),
        ("So: The answer is C, since", 2),
        ("The answer is C\n", -1),  # A line break is none.
        ("The answer is C. The answer is D.", -1),
        ("The answer is Zebra", -1),
        ("the answer is C.", -1),
        ("A. The answer is C.", 0),
        ("", -1),
        ("\uff1f", -1),  # A full-width question mark.
    ],
)
def test_scienceqa_takes_three_forms(answer, index):
    assert parse_scienceqa(answer, num_choices=4) == index


def test_a_letter_beyond_the_choices_is_wrong():
    assert score_scienceqa("C", 2, num_choices=3) == 1
    assert score_scienceqa("C", 2, num_choices=2) == 0
    assert score_scienceqa("FAILED", 0, num_choices=2) == 0


def test_scienceqa_reports_questions_with_images_apart():
    assert aggregate_scienceqa([1, 0, 1, 1], [True, True, False, False]) == {"all": 0.75, "image": 0.5}
    assert aggregate_scienceqa([1], [False]) == {"all": 1}
    with pytest.raises(ValueError, match="2 scores, 1 has_image"):
        aggregate_scienceqa([1, 0], [True])


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("B.", "B"),
        ("B,", "B"),
        ("B:", "B"),
        ("B)", "B"),
        ("B).", "B"),
        ("(B)", "B"),
        ("(B).", "B"),
        (":B", "B"),
        ("Answer :B.", "B"),
        ("Answer:B", None),
        ("The answer is B", "B"),
        ("The answer is B.", "B"),
        ("A or B", None),
        ("A, B", "B"),  # Only B stands as a word of its own.
        ("A. B.", None),
        # An A in a longer answer may be the article.
        ("A car is here", None),
        ("A blue car there", "B"),
        ("A red thing", "A"),
        ("A dog, surely (C).", "C"),
        ("E", "E"),
        ("F", None),
        ("b", None),
        ("**B**", None),
        ("the BLUE CAR", "B"),
        ("a red car and a blue car", None),
        ("it is greenish", "C"),
        ("\nB\n", "B"),
        ("\uff22", None),  # A full-width B.
        ("", None),
    ],
)
def test_mmbench_wants_exactly_one_letter_or_text(answer, letter):
    assert parse_mmbench(answer, OPTIONS) == letter


def test_mmbench_counts_an_unclear_answer_as_wrong():
    assert score_mmbench("B", "B", OPTIONS) == 1
    assert score_mmbench("A or B", "A", OPTIONS) == score_mmbench("", "A", OPTIONS) == 0


def test_mmbench_passes_over_an_empty_option():
    assert parse_mmbench("green", OPTIONS | {"D": ""}) == "C"


def test_qbench_reads_letters_as_lmms_does():
    # The official form of MMMU's rule finds no letter in these.
    assert parse_qbench("B. blurry", {"A": "sharp", "B": "blurry"}) == "B"
    assert parse_qbench("xB y", {"A": "sharp", "B": "blurry"}) == "B"
    assert score_qbench("(A)", "A", {"A": "sharp", "B": "blurry"}) == 1
    assert parse_qbench("blurry", {"A": "sharp", "B": "blurry"}) is None
    draws = Draws()
    assert parse_qbench("blurry", {"A": "sharp", "B": "blurry"}, draws) in "AB"
    assert draws.count == 1
