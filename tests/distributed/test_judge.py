"""Who hangs, from what the ranks report."""

import pytest

from llava_lite.distributed.activity import LOADER, LONG, STEP
from llava_lite.distributed.judge import (
    DONE,
    SILENT_S,
    RankState,
    describe_stalled,
    describe_waiting,
    find_lost,
    find_stalled,
)


def rank(number, text="step 3: forward", **fields):
    return RankState(number, "node", 100 + number, text=text, **({"kind": STEP, "place": 9, "age_s": 20.0} | fields))


def names(states):
    return [state.rank for state in states]


def test_all_wait_for_the_rank_that_is_behind():
    states = [rank(0, place=10, waits=True), rank(1), rank(2, place=10)]
    assert names(find_stalled(states, 15)) == [1]
    message = describe_stalled([states[1]], 3, 15)
    assert message.startswith(
        "rank 1 (host node, pid 101) hangs at 'step 3: forward' for 20 s. None of 3 ranks has made"
    )


def test_at_the_same_place_those_that_wait_for_others_are_not_to_blame():
    assert names(find_stalled([rank(0, waits=True), rank(1), rank(2, waits=True)], 15)) == [1]


def test_where_all_wait_it_is_for_one_another():
    states = find_stalled([rank(0, waits=True), rank(1, waits=True)], 15)
    assert names(states) == [0, 1]
    assert "the ranks wait for one another: rank 0" in describe_stalled(states, 2, 15)


def test_one_that_is_behind_is_to_blame_even_where_it_waits_for_its_device():
    # Of the other no stack shows that it waits: it needs a number of the device.
    assert names(find_stalled([rank(0, place=10), rank(1, waits=True)], 15)) == [1]
    assert names(find_stalled([rank(0, place=10, kind=LONG), rank(1, waits=True, kind=LONG)], 15)) == [1]


def test_the_run_goes_on_while_a_rank_makes_progress():
    assert find_stalled([rank(0, waits=True, age_s=500.0), rank(1, age_s=3.0)], 15) == []


def test_all_ranks_may_load_for_longer_than_the_timeout():
    states = [rank(number, "building the model", kind=LONG, age_s=5000.0) for number in range(2)]
    assert find_stalled(states, 1800) == []
    assert names(find_stalled([states[0]._replace(waits=True), states[1]], 1800)) == [1]


def test_ranks_that_all_stand_in_the_same_part_of_a_step_are_all_named():
    assert names(find_stalled([rank(0), rank(1)], 15)) == [0, 1]


def test_a_rank_that_has_left_is_waited_for_by_nobody():
    assert find_stalled([rank(0, age_s=500.0), rank(1, age_s=500.0, ended=DONE)], 15) == []
    assert find_lost([rank(1, ended=DONE, gone=True, silent_s=1e6)], 15) == []


@pytest.mark.parametrize("kind", [STEP, LOADER])
def test_a_rank_silent_in_a_step_is_lost(kind):
    assert names(find_lost([rank(1, kind=kind, silent_s=SILENT_S)], 1800)) == [1]
    assert find_lost([rank(1, kind=kind, silent_s=SILENT_S - 1)], 1800) == []


def test_a_rank_silent_while_it_loads_or_saves_has_as_long_as_the_timeout():
    saving = rank(1, "checkpoint of step 8: write", kind=LONG, silent_s=SILENT_S + 100)
    assert find_lost([saving], 1800) == []
    assert names(find_lost([saving._replace(silent_s=1800)], 1800)) == [1]
    assert names(find_lost([saving._replace(stopped=True)], 1800)) == [1]


def test_a_process_that_is_gone_is_lost_at_once():
    assert names(find_lost([rank(1, gone=True)], 1800)) == [1]


def test_the_warning_names_whom_all_wait_for():
    assert describe_waiting([rank(1, code="a.py:3 in f: g()")], 1800) == (
        "no rank makes progress: rank 1 (host node, pid 101) hangs at 'step 3: forward' for 20 s, at "
        "a.py:3 in f: g(). The run ends after --ddp_timeout 1800 seconds."
    )
