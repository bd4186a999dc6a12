"""A number that is not finite stops the run in its step, and never gets to disk; or its step is left out."""

import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from llava_lite.train.monitor.finite import NonFiniteError
from llava_lite.train.train import prepare, run

SAVING = ("--save_strategy", "steps", "--save_steps", 1)


class Poison(TrainerCallback):
    """Calls `hurt(model, optimizer)` after the update of a step, as a bad update would."""

    def __init__(self, step, hurt):
        self.step, self.hurt = step, hurt

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.hurt(model, optimizer)


def hurt_weight(model, optimizer):
    model.get_model().mm_projector[0].weight.data[0, 0] = float("nan")


def hurt_moment(model, optimizer):
    optimizer.state[model.get_model().mm_projector[0].weight]["exp_avg_sq"][0, 0] = float("inf")


@pytest.fixture
def data(toy_data, tmp_path):
    return toy_data(tmp_path / "data", num_records=16)


def assert_all_on_disk_is_finite(out):
    for path in out.rglob("*.safetensors"):
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(path).values()), path


@pytest.mark.parametrize(
    ("hurt", "name"),
    [
        (hurt_weight, r"rank 0: model\.mm_projector\.0\.weight"),
        (hurt_moment, r"rank 0: exp_avg_sq of model\.mm_projector\.0\.weight"),
    ],
    ids=["weight", "optimizer state"],
)
def test_an_update_that_is_not_finite_stops_the_run_in_its_step_with_the_name_and_the_records(
    hurt, name, stage_flags, data, tmp_path
):
    out = tmp_path / "out"
    stage = prepare(stage_flags("full", out, *SAVING, "--max_steps", 4, data=data))
    stage.trainer.add_callback(Poison(2, hurt))
    with pytest.raises(NonFiniteError, match=rf"^step 2: the update left .* {name}; samples .*'toy_\d+'"):
        run(stage)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (out / "config.json").exists()
    assert_all_on_disk_is_finite(out)


def test_an_update_that_overflows_in_the_last_step_leaves_no_final_directory(stage_flags, data, tmp_path):
    out = tmp_path / "out"
    stage = prepare(stage_flags("full", out, "--max_steps", 1, "--learning_rate", "inf", data=data))
    with pytest.raises(NonFiniteError, match=r"^step 1: the update left"):
        run(stage)
    assert not (out / "config.json").exists()
    assert not list(out.rglob("*.safetensors"))


def test_a_checkpoint_is_not_written_from_weights_that_went_bad_after_the_step(stage_flags, data, tmp_path):
    out = tmp_path / "out"
    stage = prepare(stage_flags("full", out, *SAVING, "--max_steps", 2, data=data))
    trainer = stage.trainer
    log = trainer.log
    # After the check of the step and before the save.
    trainer.log = lambda *args, **kwargs: (log(*args, **kwargs), hurt_weight(trainer.model, None))
    with pytest.raises(NonFiniteError, match=r"^not finite: model\.mm_projector\.0\.weight\. .*checkpoint-1 is not"):
        run(stage)
    assert not list(out.glob("checkpoint-*"))


def test_a_final_directory_is_not_written_from_weights_that_went_bad_after_the_last_step(stage_flags, data, tmp_path):
    out = tmp_path / "out"
    stage = prepare(stage_flags("full", out, "--max_steps", 1, data=data))

    class AtTheEnd(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            hurt_weight(model, None)

    stage.trainer.add_callback(AtTheEnd())
    with pytest.raises(NonFiniteError, match=r"^not finite: model\.mm_projector\.0\.weight.* is not written to "):
        run(stage)
    assert not (out / "config.json").exists()


# Steps that are left out.


class Seen(TrainerCallback):
    """Keeps weights and moments after each step."""

    def __init__(self):
        self.weights, self.moments = [], []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        weight = model.get_model().mm_projector[0].weight
        self.weights.append(weight.detach().clone())
        self.moments.append({key: value.clone() for key, value in optimizer.state[weight].items()})


def break_loss(model, calls, value=float("nan")):
    """Make the loss of the forward passes of these numbers, from 1, not finite."""
    count = []

    def hook(head, args, loss):
        count.append(1)
        return loss * (value if len(count) in calls else 1)

    model.get_output_embeddings().register_forward_hook(hook)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_with_a_bad_loss_is_left_out_and_logged_with_its_records(value, stage_flags, data, tmp_path, caplog):
    out, seen = tmp_path / "out", Seen()
    stage = prepare(stage_flags("full", out, *SAVING, "--max_steps", 4, "--max_skipped_steps", 2, data=data))
    stage.trainer.add_callback(seen)
    break_loss(stage.trainer.model, {2}, value)
    with caplog.at_level(logging.WARNING, logger="llava_lite"):
        trainer = run(stage)
    assert torch.equal(seen.weights[1], seen.weights[0])
    assert all(torch.equal(seen.moments[1][key], value) for key, value in seen.moments[0].items())
    assert not torch.equal(seen.weights[2], seen.weights[1])
    (line,) = [record.getMessage() for record in caplog.records if "left out: 1 of" in record.getMessage()]
    assert line.startswith(f"step 2: rank 0: loss {value} for samples ['toy_")
    assert line.endswith("The step is left out: 1 of --max_skipped_steps 2.")
    assert trainer.num_skipped == 1
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 3, 4]
    assert_all_on_disk_is_finite(out)


def test_a_step_with_a_bad_gradient_is_left_out(stage_flags, data, tmp_path):
    seen = Seen()
    stage = prepare(stage_flags("full", tmp_path / "out", "--max_steps", 3, "--max_skipped_steps", 1, data=data))
    trainer = stage.trainer
    trainer.add_callback(seen)
    trainer.model.get_output_embeddings().weight.register_hook(
        lambda gradient: gradient * (float("inf") if trainer.state.global_step == 1 else 1)
    )
    run(stage)
    assert torch.equal(seen.weights[1], seen.weights[0])
    assert trainer.num_skipped == 1


def test_one_bad_step_more_than_allowed_stops_the_run(stage_flags, data, tmp_path):
    stage = prepare(stage_flags("full", tmp_path / "out", "--max_steps", 4, "--max_skipped_steps", 1, data=data))
    break_loss(stage.trainer.model, {2, 3})
    with pytest.raises(NonFiniteError, match=r"^step 3: rank 0: loss nan .* All 1 steps of --max_skipped_steps are"):
        run(stage)


def test_a_resumed_run_knows_how_many_steps_were_left_out(stage_flags, data, tmp_path):
    flags = stage_flags("full", tmp_path / "out", *SAVING, "--max_steps", 4, "--max_skipped_steps", 1, data=data)
    stage = prepare(flags)
    break_loss(stage.trainer.model, {2, 3})
    with pytest.raises(NonFiniteError, match=r"^step 3: "):
        run(stage)
    stage = prepare(flags)
    assert stage.checkpoint.endswith("checkpoint-2")
    # Its first step is step 3.
    break_loss(stage.trainer.model, {1})
    with pytest.raises(NonFiniteError, match=r"^step 3: .* All 1 steps of --max_skipped_steps are"):
        run(stage)


# Two ranks, of which one has the fault.

ENGINES = {"ddp": [], "zero2": ["--deepspeed", "zero2.json"], "zero3": ["--deepspeed", "zero3.json"]}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_an_update_that_is_not_finite_on_one_rank_stops_both_in_its_step(
    engine, stage_flags, run_with_fault, data, tmp_path
):
    out = tmp_path / "out"
    flags = stage_flags("full", out, *SAVING, "--max_steps", 3, *ENGINES[engine], data=data)
    codes, logs = run_with_fault("bad_update", flags, num_ranks=2)
    assert codes == [1, 1]
    assert re.search(r"^llava-lite train: step 2: the update left .*: rank 1: exp_avg of \S+", logs[0], re.MULTILINE)
    assert "Traceback" not in "".join(logs)
    assert "the update left" not in logs[1]
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (out / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_bad_loss_on_one_rank_leaves_the_step_out_on_both(engine, stage_flags, run_with_fault, data, tmp_path):
    out = tmp_path / "out"
    more = ["--max_steps", 3, "--max_skipped_steps", 1, "--save_full", "True"]
    codes, logs = run_with_fault("bad_loss", stage_flags("full", out, *more, *ENGINES[engine], data=data), num_ranks=2)
    assert codes == [0, 0], logs[0][-2000:]
    assert re.search(r"step 2: rank 1: loss nan for samples \['toy_.* left out: 1 of --max_skipped_steps 1\.", logs[0])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    *lines, end = lines
    assert ["loss" in line for line in lines] == [True, False, True]
    assert [line.get("skipped_steps") for line in lines] == [None, 1, None]
    assert all(1 < line["loss"] < 20 for line in lines if "loss" in line)
    assert end["train_loss"] == pytest.approx((lines[0]["loss"] + lines[2]["loss"]) / 2, rel=1e-6)
    assert_all_on_disk_is_finite(out)
