"""What is unusual in a run is said, and what is usual is not."""

import math

import pytest

from llava_lite.train.monitor.report.findings import find, medians
from llava_lite.train.monitor.report.read import read_run

DONE = {"starts": [{"step": 0, "ranks": 1}], "end": {"state": "finished"}}


def losses(num=60, **more):
    """Return a loss that falls, with a little noise."""
    return [
        {"step": i, "loss": 1 + 4 / i + 0.02 * math.sin(7 * i), "grad_norm": 1.0, "tokens_per_s": 100.0, **more}
        for i in range(1, num + 1)
    ]


def found(run_dir, lines, record=None, **files):
    return find(read_run(run_dir(lines, run=DONE | (record or {}), **files)))


def test_nothing_is_said_of_a_usual_run(run_dir):
    assert found(run_dir, [*losses(), {"step": 60, "eval_loss": 1.0}]) == []


def test_medians_are_those_of_the_values_around():
    assert medians([1.0] * 15 + [9.0] + [1.0] * 15).tolist() == [1.0] * 31
    assert medians(range(41))[20] == 20


def test_a_spike_is_named_with_its_step(run_dir):
    lines = losses()
    lines[39]["loss"] = 6.5
    (said,) = found(run_dir, lines)
    assert said.startswith(
        "The loss spikes at step 40; the highest is 6.5 at step 40, where the logs around it have 1.1"
    )


def test_a_loss_that_is_always_noisy_has_no_spikes(run_dir):
    # Batches of text among batches with images: every tenth loss is the higher one.
    lines = [line | {"loss": line["loss"] * (1 + (line["step"] % 10 == 0))} for line in losses(300)]
    assert found(run_dir, lines) == []


def test_what_is_not_finite_is_named(run_dir):
    lines = losses()
    lines[9]["grad_norm"], lines[29]["loss"], lines[3]["learning_rate"] = "inf", "nan", float("-inf")
    lines[5]["tokens_per_s"], lines[6]["tokens_per_s"] = 1e308, "fast"
    assert found(run_dir, lines) == [
        "The loss is not finite at step 30.",
        "The gradient norm is not finite at step 10.",
        "The learning rate is not finite at step 4.",
        "The speed is no usable number (1e+308) at steps 6, 7.",
    ]


def test_a_gradient_that_jumps_is_named(run_dir):
    lines = losses()
    lines[19]["grad_norm"] = lines[44]["grad_norm"] = 25.0
    (said,) = found(run_dir, lines)
    assert said == "The gradient norm is more than 10 times that of the logs around it at steps 20, 45."


def test_a_loss_that_does_not_fall_and_an_evaluation_that_rises(run_dir):
    lines = [{"step": i, "loss": 2.0} for i in range(1, 21)]
    said = found(run_dir, [*lines, {"step": 10, "eval_loss": 1.5}, {"step": 20, "eval_loss": 1.75}])
    assert said[0] == "The loss did not fall: 2 in the first tenth of the logs, 2 in the last."
    assert said[1].startswith("The evaluation loss was lowest at step 10 (1.5) and is 1.75 at the last")


def test_dead_experts_and_dropped_assignments_are_named(run_dir):
    def report(i):
        late = i > 50
        return {"0": {"load": [0.5, 0.5], "dropped": 0.0}, "2": {"load": [1.0 - 0.1 * (not late), 0.1 * (not late)]}}

    lines = [line | {"experts": report(line["step"])} for line in losses()]
    lines[-1]["experts"]["0"]["dropped"] = 0.25
    dead, dropped = found(run_dir, lines)
    assert dead == "Dead experts, without a token in the last tenth of the log: layer 2: expert 1."
    assert dropped.startswith("At the last log up to 25.0% of a layer's assignments are dropped")


def test_skipped_records_are_counted_by_kind_once(run_dir):
    line = {
        "place": 3,
        "path": "a.json",
        "position": 3,
        "id": "x",
        "kind": "image",
        "reason": "there is no such file.",
    }
    (said,) = found(run_dir, losses(), skipped_records=[line, line, line | {"place": 4, "position": 4}])
    assert said == "2 records of the training data left out (2 for its image); the first: there is no such file."


def test_a_resumed_run_says_from_where_and_why(run_dir):
    starts = [
        {"step": 0, "ranks": 4, "end": {"state": "stopped", "reason": "SystemExit: 75"}},
        {"step": 30, "ranks": 2},
    ]
    (said,) = found(run_dir, losses(), {"starts": starts})
    assert said == "The run was resumed, from step 30. The ranks were 4, 2. Before it: SystemExit: 75."


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            {"end": {"state": "failed", "reason": "NonFiniteError: x"}},
            "ended with an error after step 60: NonFiniteError: x",
        ),
        ({"end": {"state": "stopped"}}, "stopped after step 60; the same command resumes it from its start"),
        ({"end": {}}, "No end of the run is recorded: it is in progress, or was killed."),
    ],
)
def test_an_end_that_is_none_is_said_first(record, words, run_dir):
    end = record["end"] or {"state": "open"}
    (said,) = found(run_dir, losses(), {"end": end})
    assert words in said


def test_steps_that_were_left_out_are_counted_by_the_logs_that_are_without_them(run_dir):
    lines = losses()
    lines[9] = {key: value for key, value in lines[9].items() if key != "loss"} | {"skipped_steps": 1}
    lines[29]["skipped_steps"] = 2
    (said,) = found(run_dir, lines)
    assert said == (
        "3 steps left out, with a loss or a gradient that was not finite (--max_skipped_steps): in the logs at steps "
        "10, 30."
    )


def test_truncated_records_and_slow_intervals_are_counted(run_dir):
    lines = losses()
    for line in lines[30:40]:
        line["tokens_per_s"] = 10.0
    data = {"train": {"records": 200, "truncated": 3, "max_length": 2048}}
    truncated, slow = found(run_dir, lines, {"data": data})
    assert truncated == "3 records (1.5%) longer than --model_max_length 2,048, truncated in training."
    assert slow.startswith("10 of 59 logged intervals ran at under half the median speed of 100 tokens/s")
