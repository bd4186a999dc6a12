"""Plots are drawn from metrics.jsonl, without a display, and a missing matplotlib is said once."""

import json
import logging
import sys

import pytest
from PIL import Image

from llava_lite.train import plots
from llava_lite.train.plots import draw_plots, series, smooth


def write(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


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


def test_running_mean_of_a_constant_is_the_constant():
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    # 0.1 * 0 * 0.9 + 0.1 * 1 over 0.1 * 0.9 + 0.1.
    assert smooth([0.0, 1.0]) == pytest.approx([0.0, 1 / 1.9])


def test_series_leaves_out_what_is_no_number():
    assert series([{"step": 1, "loss": "nan"}, {"step": 2, "loss": 1.5}, {"step": 3}], "loss") == ([2], [1.5])


def test_a_missing_matplotlib_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plots.has_matplotlib.cache_clear()
    write(tmp_path, [{"step": 1, "loss": 1.0}])
    with caplog.at_level(logging.WARNING):
        assert draw_plots(tmp_path) == draw_plots(tmp_path) == []
    assert caplog.text.count("matplotlib is not installed") == 1
    plots.has_matplotlib.cache_clear()
