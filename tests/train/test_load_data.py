"""A run's records, opened as its flags say."""

import pytest

from llava_lite.train.load_data import split


def test_split_must_leave_records_on_both_sides():
    with pytest.raises(ValueError, match="--eval_split 5 holds out 5 of 5 records"):
        split(range(5), 5, seed=0)
