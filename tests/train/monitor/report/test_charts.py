"""Curves are drawn in the colours of the page, keep their spikes, and share no id."""

import re
from types import SimpleNamespace

import pytest

from llava_lite.train.monitor.plots import get_expert_lines, get_loads, layer_order, series
from llava_lite.train.monitor.report.charts import COLOURS, curve, even, expert_charts, lengths, thin

pytestmark = pytest.mark.usefixtures("plots")


def run_of(lines):
    return SimpleNamespace(series=lambda key: series(lines, key), expert_lines=get_expert_lines(lines))


def test_a_long_curve_keeps_its_spikes():
    values = [1.0] * 10_000
    values[4321], values[77] = 9.0, -3.0
    steps, thinned = thin(range(10_000), values)
    assert len(thinned) <= 600
    assert (max(thinned), min(thinned)) == (9.0, -3.0)
    assert steps[thinned.index(9.0)] == 4321
    assert steps == sorted(steps)
    assert thin([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])


def test_even_items_have_the_first_and_the_last():
    assert even(list(range(101)), 5) == [0, 25, 50, 75, 100]
    assert even([7], 5) == [7]
    assert even([], 5) == []


@pytest.mark.parametrize("num_steps", [1, 2, 40, 3000])
def test_curves_have_the_colours_of_the_page_and_ids_of_their_own(num_steps):
    lines = [{"step": i, "loss": 5 / i, "learning_rate": 1e-5} for i in range(1, num_steps + 1)]
    run = run_of([*lines, {"step": num_steps, "eval_loss": 2.0}])
    drawn = [curve(run, "loss", "Loss <", "nats", "a", "eval_loss"), curve(run, "learning_rate", "Rate", "", "b")]
    assert "evaluation" in drawn[0]
    for one in drawn:
        assert not [colour for colour in COLOURS if colour in one]
        assert "var(--c0)" in one
        assert "var(--ink)" in one
        assert "http" not in one
    assert "Loss &lt;: 5 at step 1" in drawn[0]
    ids = [set(re.findall(r'\bid="([^"]+)"', one)) for one in drawn]
    assert ids[0]
    assert not ids[0] & ids[1]
    for own, one in zip(ids, drawn, strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', one)) <= own


def test_a_key_that_is_not_logged_has_no_curve():
    assert curve(run_of([{"step": 1, "loss": "nan"}]), "loss", "Loss", "", "a") is None


def test_a_loss_that_falls_to_a_tenth_has_a_logarithmic_axis():
    run = run_of([{"step": i, "loss": 10 / i} for i in range(1, 40)])
    assert "logarithmic" in curve(run, "loss", "Loss", "nats", "a")


@pytest.mark.parametrize("num_experts", [2, 8, 64])
def test_each_moe_layer_has_its_chart(num_experts):
    load = [1 / num_experts] * num_experts
    layers = {str(layer): {"load": load} for layer in (10, 0, 2)}
    drawn = expert_charts(run_of([{"step": i, "experts": layers} for i in range(1, 5)]))
    assert re.findall(r"<strong>(Layer \d+)</strong>", drawn) == ["Layer 0", "Layer 2", "Layer 10"]
    assert ("data:image/png;base64," in drawn) == (num_experts > 8)
    assert ("expert 1<" in drawn) == (num_experts <= 8)


def test_loads_that_are_none_are_left_out():
    reports = [{"0": {"load": [0.5, 0.5]}}, {"0": "x", "1": {"load": []}}, {"0": {"load": [0.2, 0.8]}}, "x", {"0": 3}]
    # Texts and numbers that are no fractions.
    reports += [{"0": {"load": load}} for load in (["nan", 0.5], [0.5, None], [10**400, 0], "ab")]
    lines = get_expert_lines([{"step": i, "experts": one} for i, one in enumerate(reports, 1)])
    assert get_loads(lines, "0") == ([1, 3], [[0.5, 0.5], [0.2, 0.8]])
    assert get_loads(lines, "1") == ([], [])
    # A run that went on with other experts: those of its last step.
    assert get_loads([(1, {"0": {"load": [1.0]}}), lines[0]], "0") == ([1], [[0.5, 0.5]])
    assert sorted(["10", "x", "9", "\u00b2"], key=layer_order) == ["9", "10", "x", "\u00b2"]
    assert expert_charts(run_of([{"step": 1}])) is None


def test_lengths_are_bars():
    assert "Histogram of 3 records of 4 to 8 tokens" in lengths({"counts": [1, 2], "edges": [4, 6, 8]}, "train")
