"""Intervals of means and of other figures."""

import numpy as np
import pytest

from llava_lite.eval.scoring.interval import bootstrap_interval, mean_interval, wilson_interval
from llava_lite.eval.scoring.mme import pair_scores


@pytest.mark.parametrize(
    ("num_right", "num_questions", "low", "high"),
    # By hand from (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with z = 1.959964.
    [(10, 20, 0.2993, 0.7007), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (1, 1, 0.2065, 1), (81, 263, 0.2553, 0.3662)],
)
def test_wilsons_interval(num_right, num_questions, low, high):
    assert wilson_interval(num_right, num_questions) == (
        pytest.approx(low, abs=5e-5),
        pytest.approx(high, abs=5e-5),
    )


def test_scores_of_0_and_1_get_wilsons_interval():
    assert mean_interval([1, 0] * 10) == wilson_interval(10, 20)
    assert mean_interval([True, False] * 10) == wilson_interval(10, 20)
    assert mean_interval([0.0] * 10)[0] == 0
    assert mean_interval([1.0] * 10)[1] == 1


def test_a_wider_level_gives_a_wider_interval():
    narrow, wide = (mean_interval([1, 0] * 10, level=level) for level in (0.9, 0.99))
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]


def test_other_scores_get_the_bootstraps_interval():
    """For many scores it is the mean plus and minus 1.96 standard errors; 1000 draws leave it 5% off at most."""
    scores = np.random.default_rng(1).choice([0, 0.3, 0.6, 0.9, 1], size=2000)
    low, high = mean_interval(scores.tolist())
    error = 1.96 * scores.std() / np.sqrt(2000)
    assert (high - low) / 2 == pytest.approx(error, rel=0.05)
    assert (high + low) / 2 == pytest.approx(scores.mean(), abs=0.1 * error)


def test_the_same_seed_gives_the_same_interval():
    scores = [0, 0.3, 0.6, 0.9, 1] * 20
    assert mean_interval(scores) == mean_interval(scores)
    assert mean_interval(scores) != mean_interval(scores, seed=1)


def test_equal_scores_have_no_width():
    assert mean_interval([0.3] * 50) == (pytest.approx(0.3), pytest.approx(0.3))
    assert mean_interval([0.6]) == (0.6, 0.6)


def test_groups_are_drawn_together():
    """Ten copies of each question say no more than one: the interval is that of the groups, sqrt(10) times wider."""
    base = np.random.default_rng(2).integers(2, size=200)
    scores, groups = np.repeat(base, 10).tolist(), np.repeat(np.arange(200), 10).tolist()
    alone, together = mean_interval(scores), mean_interval(scores, groups)
    assert (together[1] - together[0]) / (alone[1] - alone[0]) == pytest.approx(np.sqrt(10), rel=0.07)


def test_unequal_groups_keep_the_mean_over_questions():
    low, high = mean_interval([1] * 9 + [0], ["a"] * 9 + ["b"])
    assert (low, high) == (0, 1)
    assert mean_interval([1, 0, 1, 0], [("x", 1), ("x", 1), ("x", 2), ("x", 2)]) == (0.5, 0.5)


def test_strata_keep_their_sizes():
    kinds = np.array(["a"] * 5 + ["b"] * 3)
    seen = []
    bootstrap_interval(8, lambda chosen: seen.append(kinds[chosen].tolist()) or 0.0, strata=kinds, num_resamples=20)
    assert all(sorted(draw) == kinds.tolist() for draw in seen)


def test_groups_of_one_label_in_two_strata_are_two():
    groups, strata = ["1.png"] * 4, ["OCR", "OCR", "count", "count"]
    seen = []
    bootstrap_interval(
        4, lambda chosen: seen.append(chosen.tolist()) or 0.0, groups=groups, strata=strata, num_resamples=5
    )
    assert seen == [[0, 1, 2, 3]] * 5


def test_groups_in_strata_stay_together():
    groups, strata = [1, 1, 2, 2, 3, 3, 4, 4], ["a"] * 4 + ["b"] * 4
    seen = []
    bootstrap_interval(
        8, lambda chosen: seen.append(chosen.tolist()) or 0.0, groups=groups, strata=strata, num_resamples=50
    )
    for draw in seen:
        assert all(second == first + 1 and first % 2 == 0 for first, second in zip(draw[::2], draw[1::2], strict=True))
        assert [i < 4 for i in draw] == [True] * 4 + [False] * 4


def test_the_interval_of_an_mme_sum():
    """Each task's pairs are drawn by themselves, so the sum of two tasks with equal pairs has no width."""
    pairs = pair_scores(["OCR"] * 4 + ["count"] * 4, list("aabbccdd"), [1, 1, 1, 1, 0, 1, 1, 0])
    tasks, values = [task for task, _ in pairs], np.array([*pairs.values()])
    names = np.array(tasks)

    def total(chosen):
        return sum(values[chosen][names[chosen] == task].mean() for task in ("OCR", "count"))

    assert bootstrap_interval(len(pairs), total, strata=tasks) == (250, 250)


@pytest.mark.parametrize("scores", [[], [0.3, float("nan")], [float("inf")]])
def test_no_scores_and_scores_that_are_no_numbers_are_errors(scores):
    with pytest.raises(ValueError, match="scores are finite numbers"):
        mean_interval(scores)


def test_impossible_counts_and_unequal_lists_are_errors():
    with pytest.raises(ValueError, match="3 right of 2 questions"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="0 right of 0"):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match="2 scores, 1 groups"):
        mean_interval([0, 1], ["a"])
    with pytest.raises(ValueError, match="2 questions, 1 strata"):
        bootstrap_interval(2, len, strata=["a"])
    with pytest.raises(ValueError, match="0 questions"):
        bootstrap_interval(0, len)
