"""Relaxed accuracy, against vectors that lmms-eval's function gave."""

import pytest

from llava_lite.eval.scoring.numbers import aggregate, score, to_number


@pytest.mark.parametrize(
    ("prediction", "truth", "right"),
    [
        ("95", "100", True),
        ("94.9", "100", False),
        ("0", "0", True),
        ("0.0", "0", False),
        ("5%", "0.05", True),
        ("5", "5%", False),
        ("1,000", "1000", False),
        ("2015", "2020", True),
        # By hand.
        ("105", "100", True),
        ("105.1", "100", False),
        ("-95", "-100", True),
        ("95", "-100", False),
        ("$5", "5", False),
        ("5.", "5", True),
        (" 5\n", "5", True),
        ("1e2", "100", True),
        ("Yes", "yes", True),
        ("yes.", "yes", False),
        ("", "", True),
        ("", "0", False),
        ("%", "%", True),
        ("50 %", "50%", True),
        ("50%%", "50%", True),
        ("five", "5", False),
        ("5", "five", False),
        ("\uff15", "5", True),  # A full-width digit is a number to Python.
        ("nan", "5", False),
        ("inf", "5", False),
        ("ÉTÉ", "été", True),
    ],
)
def test_an_answer_may_be_5_percent_off(prediction, truth, right):
    assert score(prediction, truth) == float(right)


def test_the_tolerance_is_a_fraction_of_the_truth():
    assert score("95.3", "100") == 1
    assert score("100", "95.3") == 1
    assert score("100", "95.2") == 0
    assert score("90", "100", tolerance=0.1) == 1


def test_a_percentage_is_a_hundredth():
    assert (to_number("12.5%"), to_number("12.5"), to_number("12,5"), to_number("")) == (0.125, 12.5, None, None)


def test_scores_are_summed_up_by_part():
    assert aggregate([1, 0, 1], ["human", "human", "augmented"]) == {
        "overall": pytest.approx(2 / 3),
        "human": 0.5,
        "augmented": 1,
    }
