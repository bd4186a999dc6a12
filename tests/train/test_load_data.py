"""A run's records, opened as its flags say."""

import json

import pytest

from llava_lite.train.load_data import split


def test_split_must_leave_records_on_both_sides():
    with pytest.raises(ValueError, match="--eval_split 5 holds out 5 of 5 records"):
        split(range(5), 5, seed=0)


def test_records_of_which_none_is_left_are_refused_with_the_first(run_stage, tmp_path):
    path = tmp_path / "all_bad.json"
    path.write_text(json.dumps([{"id": "mute", "conversations": []}]))
    flags = ("--data_path", path, "--bad_record", "skip", "--max_bad_share", 1)
    with pytest.raises(ValueError, match=r"none of 1 records can be used; the first: .*mute.*'conversations' is"):
        run_stage("projector", tmp_path / "out", *flags)
