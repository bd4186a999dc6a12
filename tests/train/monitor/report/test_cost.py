"""What a run took, from logs of every age."""

from types import SimpleNamespace

import pytest

from llava_lite.train.monitor.plots import series
from llava_lite.train.monitor.report.cost import Cost


def cost_of(lines, ranks=2, record=None):
    return Cost(
        SimpleNamespace(
            lines=lines, ranks=ranks, record=record or {}, state={}, loss_key="loss",
            series=lambda key: series(lines, key), last=lambda key: (series(lines, key)[1] or [None])[-1],
        )
    )  # fmt: skip


# 2 ranks: 400 tokens at 2 x 100 a second are 2 seconds, 600 at 2 x 50 are 6.
LINES = [
    {"step": 1, "loss": 2.0, "tokens": 400, "padded_tokens": 500, "records": 4, "tokens_per_s": 100.0, "mfu": 0.4},
    {"step": 2, "loss": 1.0, "tokens": 600, "padded_tokens": 750, "records": 4, "tokens_per_s": 50.0, "mfu": 0.2},
]


def test_means_are_over_time():
    cost = cost_of(LINES)
    assert cost.tokens == 1000
    assert cost.seconds == pytest.approx(8)
    # 1000 tokens on 2 devices in 8 seconds.
    assert cost.rate == pytest.approx(62.5)
    assert cost.mfu == pytest.approx((0.4 * 2 + 0.2 * 6) / 8)
    assert cost.padding == pytest.approx(0.2)
    assert not cost.is_complete


def test_the_time_of_a_finished_run_is_that_of_the_trainer():
    ended = [*LINES, {"step": 2, "train_runtime": 3600.0, "total_flos": 1.5e15}]
    rows = dict(cost_of(ended, record={"end": {"memory_gib": 3.25}}).rows())
    assert rows["time"] == "60.0 minutes"
    assert rows["device hours"] == "2 (2 x 60.0 minutes)"
    assert rows["work"] == "1.5e+15 FLOPs"
    assert rows["records trained on"] == "8, repeats counted"
    assert rows["peak memory"].startswith("3.2 GiB")


def test_an_old_log_without_tokens_has_its_rate():
    cost = cost_of(
        [{"step": 1, "loss": 2.0, "tokens_per_s": 100.0}, {"step": 2, "loss": 1.0, "tokens_per_s": 50.0}], None
    )
    assert (cost.tokens, cost.seconds, cost.mfu, cost.padding) == (None, None, None, None)
    assert cost.rate == 75
    assert cost.rows() == [("speed", "75 tokens/s a device")]


def test_a_log_of_nothing_costs_nothing():
    assert cost_of([]).rows() == []
