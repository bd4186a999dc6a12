"""Plots are drawn from metrics.jsonl, without a display, and a missing matplotlib is reported once."""

import json
import logging
import sys

import pytest
from PIL import Image

from llava_lite.train.monitor import plots
from llava_lite.train.monitor.plots import (
    draw_plots,
    get_window,
    needs_log_axis,
    new_figure,
    series,
    smooth,
    use_log_axis,
)

pytestmark = pytest.mark.usefixtures("plots")


def write(directory, lines):
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_dense_run_has_one_plot(tmp_path):
    write(tmp_path, [{"step": i, "loss": 3.0 / i} for i in range(1, 6)] + [{"step": 5, "eval_loss": 1.0}])
    assert draw_plots(tmp_path) == [tmp_path / "loss.png"]
    assert Image.open(tmp_path / "loss.png").size[0] > 400


def test_a_run_with_experts_has_two(tmp_path):
    experts = {str(layer): {"load": [0.25, 0.5, 0.25]} for layer in (0, 2, 4, 6, 8)}
    write(tmp_path, [{"step": i, "loss": 2.0, "lm_loss": 1.9, "moe_loss": 0.1, "experts": experts} for i in (1, 2)])
    assert draw_plots(tmp_path) == [tmp_path / "loss.png", tmp_path / "expert_load.png"]
    assert Image.open(tmp_path / "expert_load.png").size[0] > 800


def test_nothing_logged_draws_nothing(tmp_path):
    assert draw_plots(tmp_path) == []


@pytest.mark.parametrize(("num_values", "window"), [(1, 1), (5, 1), (24, 1), (50, 3), (500, 21), (5000, 201)])
def test_window_of_the_mean_grows_with_the_run(num_values, window):
    assert get_window(num_values) == window


def test_mean_around_a_value_is_that_of_its_neighbours():
    assert smooth([3.0, 5.0, 1.0], 1) == [3.0, 5.0, 1.0]
    # Nothing stands before the first; nothing after the last.
    assert smooth([1.0, 2.0, 6.0, 4.0], 3) == [1.0, 3.0, 4.0, 5.0]
    # Two from either side where there are two before; one at the second value.
    assert smooth([0.0, 6.0, 3.0, 1.0, 5.0], 5) == [0.0, 3.0, 3.0, 15 / 4, 9 / 3]
    assert smooth([2.0] * 9, 5) == [2.0] * 9
    assert smooth([], 3) == []


@pytest.mark.parametrize(
    ("values", "is_log"),
    [
        ([7.0, 0.7], True),
        ([7.0, 0.71], False),
        ([2.5, 0.9], False),
        ([7.0, 0.0], False),
        ([7.0, -0.1], False),
        ([], False),
    ],
)
def test_axis_is_logarithmic_where_a_curve_would_lie_on_it(values, is_log):
    assert needs_log_axis(values) == is_log


@pytest.mark.parametrize("num_steps", [1, 5, 50, 5000])
@pytest.mark.parametrize("end", [3.0, 0.01])
def test_runs_of_any_length_are_drawn(num_steps, end, tmp_path):
    experts = {"0": {"load": [0.5, 0.5]}}
    lines = [
        {"step": i, "loss": 3.1, "lm_loss": 7 + (end - 7) * i / num_steps, "moe_loss": 0.1, "experts": experts}
        for i in range(1, num_steps + 1)
    ]
    write(tmp_path, [*lines, {"step": num_steps, "eval_loss": end}])
    assert draw_plots(tmp_path) == [tmp_path / "loss.png", tmp_path / "expert_load.png"]


def test_axes_of_a_log_plot_bear_plain_numbers(tmp_path):
    figure, (axis,) = new_figure(1, 1, 7, 4)
    axis.plot([1, 2, 3], [7.0, 1.0, 0.05])
    use_log_axis(axis)
    figure.savefig(tmp_path / "x.png")
    shown = [label.get_text() for label in axis.get_yticklabels()]
    assert {"0.05", "0.1", "0.2", "0.5", "1", "2", "5"} <= set(shown)
    assert not [label for label in shown if "10^" in label]


def test_series_leaves_out_what_is_no_number():
    assert series([{"step": 1, "loss": "nan"}, {"step": 2, "loss": 1.5}, {"step": 3}], "loss") == ([2], [1.5])


def test_a_missing_matplotlib_is_reported_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plots.has_matplotlib.cache_clear()
    write(tmp_path, [{"step": 1, "loss": 1.0}])
    with caplog.at_level(logging.WARNING):
        assert draw_plots(tmp_path) == draw_plots(tmp_path) == []
    assert caplog.text.count("matplotlib is not installed") == 1
    plots.has_matplotlib.cache_clear()
