"""Means of scores and of their kinds."""

import pytest

from llava_lite.eval.scoring.means import group_by, mean, means_by


def test_kinds_stand_in_the_order_in_which_they_appear():
    assert list(means_by([1, 0, 1], ["z", "a", "z"]).items()) == [("z", 1), ("a", 0)]
    assert group_by([1, 0.5, 0], ["z", "a", "z"]) == {"z": [1, 0], "a": [0.5]}
    assert means_by([], []) == {}


def test_no_scores_have_no_mean():
    assert mean([1, 0]) == 0.5
    with pytest.raises(ValueError, match="0 scores have no mean"):
        mean([])
