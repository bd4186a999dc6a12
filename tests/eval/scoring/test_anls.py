"""ANLS, against vectors that lmms-eval's function gave."""

import pytest

from llava_lite.eval.scoring.anls import edit_distance, score


@pytest.mark.parametrize(
    ("prediction", "truths", "expected"),
    [
        ("helo", ["hello"], 0.8),
        ("ab", ["abcd"], 0.5),
        ("", [""], 1),
        ("jan 5", ["january 5", "jan. 5"], 5 / 6),
        # By hand.
        ("a", ["abcd"], 0),  # 0.25 is below the threshold.
        ("", ["x"], 0),
        ("x", [""], 0),
        ("HELLO", ["hello"], 1),
        (" hello \n world ", ["hello world"], 1),
        ("abcde", ["abcdf", "abcde"], 1),
        # Distances are of cleaned texts, the length of those that came: 1 / 12 instead of 1 / 4.
        ("abcd        ", ["abce"], 11 / 12),
        ("12,000", ["12000"], 5 / 6),
        ("caf\u00e9", ["cafe"], 0.75),
        ("猫", ["猫"], 1),
        # In upper case, which is what is measured, this text has six characters.
        ("straß", ["stras"], 5 / 6),
    ],
)
def test_the_nearest_truth_counts(prediction, truths, expected):
    assert score(prediction, truths) == pytest.approx(expected)


def test_the_threshold_can_be_chosen():
    assert score("a", ["abcd"], threshold=0.2) == 0.25


@pytest.mark.parametrize("truths", [[], "hello"])
def test_truths_are_a_list_of_one_or_more(truths):
    with pytest.raises(ValueError, match="a list of one truth or more"):
        score("hello", truths)


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("abc", "cba", 2), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_an_edit_is_an_insertion_a_deletion_or_a_replacement(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance
