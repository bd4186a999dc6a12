"""Whatever stands in a log in place of a number, a run has its page and its plots."""

import json
import random

import pytest

from llava_lite.train.monitor.plots import draw_plots
from llava_lite.train.monitor.report.page import write_report

KEYS = ["loss", "lm_loss", "moe_loss", "learning_rate", "grad_norm", "tokens_per_s", "mfu", "tokens", "padded_tokens"]
KEYS += ["records", "eval_loss", "eval_runtime", "train_runtime", "total_flos"]
ODD = [
    float("nan"),
    float("inf"),
    -float("inf"),
    1e308,
    -1e308,
    5e-324,
    1e30,
    -1e30,
    10**400,
    -(10**25),
    0,
    -1,
    1e-300,
]
ODD += ["", "nan", "text", None, True, [], [1.0], {}, {"a": 1}]
SECTIONS = ("Curves", "Cost", "Expert load")


def lines_of(num, value=None, keys=()):
    """Return a log of `num` lines, and in the middle one `value` for some keys."""
    load = {"0": {"load": [0.5, 0.5], "dead": 0, "dropped": 0.0, "balance_loss": 1.0}}
    lines = [
        dict.fromkeys(KEYS, 1.0 + 3 / i) | {"step": i, "tokens": 50, "padded_tokens": 60, "experts": load}
        for i in range(1, num + 1)
    ]
    lines[num // 2] |= dict.fromkeys(keys, value)
    return lines


def check_page(directory):
    """Make the page and the plots; both have their curves."""
    page = write_report(directory).read_text(encoding="utf-8")
    assert "is not as llava-lite writes it" not in page
    assert all(f">{title}</h2>" in page for title in SECTIONS)
    assert "<svg" in page

    assert [path.name for path in draw_plots(directory)] == ["loss.png", "expert_load.png"]


@pytest.mark.usefixtures("plots")
def test_any_value_in_a_line_draws_a_page(run_dir):
    lines = lines_of(3 * len(ODD))
    for line, value in zip(lines[len(ODD) :], ODD, strict=False):
        line |= dict.fromkeys(KEYS, value)
    check_page(run_dir(lines))


# The largest and the smallest numbers that are drawn, and some that are not.
@pytest.mark.parametrize("value", [1e30, -1e30, 5e-324, 0, float("inf"), 1e308])
@pytest.mark.usefixtures("plots")
@pytest.mark.parametrize("num", [2, 60])
def test_a_number_of_any_size_draws_a_page(num, value, run_dir):
    check_page(run_dir(lines_of(num, value, KEYS)))


@pytest.mark.usefixtures("plots")
@pytest.mark.parametrize("key", ["load", "dead", "dropped", "balance_loss", "experts", "layer"])
def test_any_value_in_the_reports_of_experts_draws_a_page(key, run_dir):
    lines = lines_of(2 * len(ODD))
    for line, value in zip(lines, ODD, strict=False):
        report = line["experts"]["0"]
        odd = {"experts": value, "layer": {"0": value}}.get(key, {"0": report | {key: value}})
        line["experts"] = odd
    lines[0]["experts"] = {"0": {"load": [value for value in ODD if not isinstance(value, dict)]}}
    check_page(run_dir(lines))


@pytest.mark.usefixtures("plots")
def test_missing_keys_draw_a_page(run_dir):
    lines = lines_of(40)
    for i, line in enumerate(lines[1:-1]):
        line.pop([*KEYS, "experts"][i % (len(KEYS) + 1)])
    check_page(run_dir(lines))


@pytest.mark.usefixtures("plots")
def test_random_logs_draw_a_page(run_dir):
    chance = random.Random(0)
    for i in range(3):
        lines = lines_of(30)
        for line in lines[2:]:
            line |= {key: chance.choice(ODD) for key in chance.sample(KEYS, 5)}
        check_page(run_dir(lines, name=f"run {i}"))


@pytest.mark.parametrize("value", ODD, ids=lambda value: str(value)[:12])
def test_any_value_in_run_json_and_in_the_state_draws_a_page(value, run_dir):
    names = ["base", "tower", "dtype", "zero_stage", "max_steps", "records_a_step", "tuning", "model_type", "given"]
    names += ["starts", "end", "data", "experts", "parameters", "versions", "images", "settings"]
    good = {"starts": [{"date": "2026-01-31T12:00:00", "step": 0, "ranks": 1, "device": "CPU"}]}
    state = {"global_step": value, "max_steps": value, "log_history": value, "total_flos": value}
    for name in names:
        directory = run_dir(lines_of(12), name=name, run=good | {name: value}, trainer_state=state)
        (directory / "config.json").write_text(json.dumps({"moe": value, "mm_vision_tower": value}))
        page = write_report(directory).read_text(encoding="utf-8")
        assert all(f">{title}</h2>" in page for title in (*SECTIONS, "The run", "Data", "Flags"))
