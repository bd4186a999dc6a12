"""The losses that a run logs are means over the steps that it took: one that is left out counts in none of them."""

import json
import math

import pytest

from llava_lite.train.monitor.summary import loss_line, skipped_line, summary
from llava_lite.train.train import prepare, run

KEYS = ("loss", "lm_loss", "moe_loss", "grad_norm", "train_loss")


@pytest.fixture
def data(toy_data, tmp_path):
    return toy_data(tmp_path / "data", num_records=24)


def train(flags, broken=(), value=float("nan")):
    """Train; return the trainer, its result, and [(step, loss, cross-entropy)] of its micro-batches as computed.

    broken: numbers of the forward passes, from 1, whose cross-entropy is made `value`, and thereby their loss.
    """
    stage, computed = prepare(list(map(str, flags))), []
    trainer, entropies = stage.trainer, []
    training_step, train = trainer.training_step, trainer.train

    def break_loss(head, args, loss):
        entropies.append(loss.item())
        return loss * (value if len(entropies) in broken else 1)

    def noting_step(*args, **kwargs):
        loss = training_step(*args, **kwargs).item()
        computed.append((trainer.state.global_step + 1, loss, entropies[-1]))
        return loss * trainer.model.get_output_embeddings().weight.new_ones(())

    results = []
    trainer.model.get_output_embeddings().register_forward_hook(break_loss)
    trainer.training_step = noting_step
    trainer.train = lambda **kwargs: results.append(train(**kwargs)) or results[-1]
    return run(stage), results[0], computed


def read_lines(out):
    """Return the lines of the log of training steps, by step, and the one that ends the run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "learning_rate" in line}, lines[-1]


def losses_of_steps(computed):
    """Return {step: (loss, cross-entropy)} of the steps without a broken micro-batch."""
    steps = {step: [part[1:] for part in computed if part[0] == step] for step, _, _ in computed}
    sums = {step: tuple(map(sum, zip(*parts, strict=True))) for step, parts in steps.items()}
    return {step: both for step, both in sums.items() if math.isfinite(both[0])}


ACCUMULATED = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
CASES = {
    # Stage, further flags, broken forward passes, their value, steps left out.
    "one of one": ("full", [], {2}, float("nan"), {2}),
    "the first": ("full", [], {1}, float("inf"), {1}),
    "the last": ("full", [], {6}, float("nan"), {6}),
    "one of three": ("full", ["--logging_steps", 3], {2}, float("nan"), {2}),
    "two of three": ("full", ["--logging_steps", 3], {4, 6}, float("inf"), {4, 6}),
    "three of three": ("full", ["--logging_steps", 3], {4, 5, 6}, float("nan"), {4, 5, 6}),
    "filtered": ("full", ["--logging_steps", 3, "--logging_nan_inf_filter", True], {2}, float("nan"), {2}),
    "first micro-batch": ("moe", ACCUMULATED, {5}, float("nan"), {3}),
    "second micro-batch": ("moe", [*ACCUMULATED, "--logging_steps", 4], {6}, float("inf"), {3}),
}


@pytest.mark.parametrize("case", CASES)
def test_logged_losses_are_means_over_the_steps_that_were_taken(case, stage_flags, data, tmp_path):
    stage, more, broken, value, left_out = CASES[case]
    out, every = tmp_path / "out", more[more.index("--logging_steps") + 1] if "--logging_steps" in more else 1
    flags = stage_flags(stage, out, "--max_steps", 6, "--max_skipped_steps", 3, *more, data=data)
    trainer, result, computed = train(flags, broken, value)
    taken = losses_of_steps(computed)
    assert set(range(1, 7)) - set(taken) == left_out
    lines, end = read_lines(out)
    assert sorted(lines) == [step for step in range(1, 7) if step % every == 0]
    for step, line in lines.items():
        interval = range(step - every + 1, step + 1)
        means = [
            sum(taken[one][part] for one in interval if one in taken) / max(1, sum(one in taken for one in interval))
            for part in (0, 1)
        ]
        num_skipped = sum(one in left_out for one in interval)
        assert line.get("skipped_steps", 0) == num_skipped
        if num_skipped == every:
            assert not {"loss", "lm_loss", "moe_loss", "grad_norm", "experts"} & set(line)
            continue
        assert line["loss"] == pytest.approx(means[0], rel=1e-6)
        if stage == "moe":
            assert line["lm_loss"] == pytest.approx(means[1], rel=1e-5)
            # As many micro-batches as were taken, and 0.01 times the sum over layers of their mean.
            balance = sum(layer["balance_loss"] for layer in line["experts"].values())
            assert line["moe_loss"] == pytest.approx(0.01 * balance, rel=1e-5)
        # Of the last step of the interval.
        assert ("grad_norm" in line) == (step not in left_out)
    mean = sum(loss for loss, _ in taken.values()) / len(taken)
    assert end["train_loss"] == pytest.approx(mean, rel=1e-6)
    assert result.training_loss == result.metrics["train_loss"] == end["train_loss"]
    assert trainer.num_skipped == len(left_out)
    text = summary(trainer, result, True, 1.0)
    last = [line for line in lines.values() if "loss" in line][-1]
    assert f"  loss        {last['lm_loss' if stage == 'moe' else 'loss']:.4f} at the end, " in text
    plural = "s" * (len(left_out) > 1)
    assert f"  skipped     {len(left_out)} step{plural} with a loss or a gradient that was not finite" in text


def test_until_the_first_bad_step_the_losses_are_those_of_a_run_without_one(stage_flags, data, tmp_path):
    logs = []
    for name, broken in (("whole", ()), ("skipping", {3})):
        flags = stage_flags("full", tmp_path / name, "--max_steps", 3, "--max_skipped_steps", 1, data=data)
        train(flags, broken)
        logs.append(read_lines(tmp_path / name)[0])
    whole, skipping = logs
    assert [skipping[step]["loss"] for step in (1, 2)] == [whole[step]["loss"] for step in (1, 2)]
    assert "loss" not in skipping[3]
    assert not any("skipped_steps" in line for line in whole.values())


def test_a_step_that_is_left_out_for_its_gradient_has_no_loss_either(stage_flags, data, tmp_path):
    out = tmp_path / "out"
    more = ["--max_steps", 3, "--max_skipped_steps", 1, "--logging_steps", 3]
    stage = prepare(stage_flags("full", out, *more, data=data))
    trainer, found = stage.trainer, []
    trainer.model.get_output_embeddings().weight.register_hook(
        lambda gradient: gradient * (float("inf") if trainer.state.global_step == 1 else 1)
    )
    training_step = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: found.append(training_step(*args, **kwargs)) or found[-1]
    run(stage)
    line = read_lines(out)[0][3]
    assert line["loss"] == pytest.approx((found[0].item() + found[2].item()) / 2, rel=1e-6)
    assert line["skipped_steps"] == 1


@pytest.mark.parametrize("stage", ["full", "moe"])
def test_a_run_that_resumes_in_the_middle_of_an_interval_logs_the_same(stage, stage_flags, data, tmp_path):
    more = ["--max_steps", 6, "--max_skipped_steps", 2, "--logging_steps", 3, "--save_strategy", "steps"]
    more += ["--save_steps", 1]
    train(stage_flags(stage, tmp_path / "full", *more, data=data), {2, 4})
    expected, end = read_lines(tmp_path / "full")
    assert [line.get("skipped_steps") for line in expected.values()] == [1, 1]
    # What is not finite is text in the log.
    assert all(isinstance(line["loss"], float) for line in expected.values())
    for step in (2, 4):
        out, checkpoint = tmp_path / f"from_{step}", tmp_path / f"full/checkpoint-{step}"
        resumed = ["--resume_from_checkpoint", checkpoint]
        # Step 4 is the second forward pass of the run that resumes after step 2.
        train(stage_flags(stage, out, *more, *resumed, data=data), {2} if step == 2 else ())
        found, found_end = read_lines(out)
        for line_step, line in found.items():
            assert {key: line.get(key) for key in KEYS} == {key: expected[line_step].get(key) for key in KEYS}
            assert line["skipped_steps"] == expected[line_step]["skipped_steps"]
        assert 6 in found
        assert found_end["train_loss"] == end["train_loss"]


def test_a_run_of_which_every_step_was_left_out_says_that_it_has_no_loss(stage_flags, data, tmp_path):
    out = tmp_path / "out"
    trainer, result, _ = train(
        stage_flags("full", out, "--max_steps", 2, "--max_skipped_steps", 2, data=data), broken={1, 2}
    )
    assert math.isnan(result.training_loss)
    lines, end = read_lines(out)
    assert not any("loss" in line for line in lines.values())
    assert "train_loss" not in end
    assert "  loss        none: no step was taken" in summary(trainer, result, True, 1.0)


def test_the_lines_of_the_summary():
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "skipped_steps": 1}]
    assert loss_line(log, 2.0) == "2.0000 at the end, 2.0000 at the start"
    assert loss_line([], 2.5) == "2.5000 on average; no step was logged (--logging_steps)"
    assert skipped_line(0) == ""
    assert skipped_line(1).startswith("1 step with a loss or a gradient that was not finite")
