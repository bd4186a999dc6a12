"""A step is the same step however it is divided; what goes wrong stops the run before anything is written."""

import json

import pytest
import torch

from llava_lite.train.monitor.finite import NonFiniteError
from llava_lite.train.train import prepare, run

# SGD, so that a difference in a gradient is seen as it is; Adam would hide its size.
SGD = ["--optim=sgd", "--learning_rate=0.1", "--max_grad_norm=0", "--group_by_modality_length=True", "--max_steps=3"]


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weights(trainer):
    return {name: param.detach().clone() for name, param in trainer.model.named_parameters() if param.requires_grad}


@pytest.fixture
def data(toy_data, tmp_path):
    return toy_data(tmp_path / "data", num_records=24, text_only_every=3)


@pytest.mark.parametrize("stage", ["full", "moe"])
def test_accumulating_changes_neither_loss_nor_weights(run_stage, stage, data, tmp_path):
    # Without its balance loss, which is a mean over micro-batches by definition.
    more = ["--router_aux_loss_coef", 0] if stage == "moe" else []
    runs = {}
    for batch, steps in ((8, 1), (4, 2), (1, 8)):
        split = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", steps]
        runs[batch] = run_stage(stage, tmp_path / f"{batch}", *SGD, *more, *split, data=data)
    full = runs[8]
    for batch in (4, 1):
        assert losses(runs[batch]) == pytest.approx(losses(full), rel=1e-6)
        for name, weight in weights(runs[batch]).items():
            torch.testing.assert_close(weight, weights(full)[name], rtol=1e-4, atol=1e-6, msg=name)


def test_balance_loss_is_the_mean_over_micro_batches(run_stage, data, tmp_path):
    trainer = run_stage(
        "moe",
        tmp_path / "out",
        *SGD,
        "--per_device_train_batch_size",
        2,
        "--gradient_accumulation_steps",
        4,
        data=data,
    )
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "experts" in line)
    # 0.01 times the sum over layers of each layer's mean over micro-batches.
    expected = 0.01 * sum(layer["balance_loss"] for layer in first["experts"].values())
    assert first["moe_loss"] == pytest.approx(expected, rel=1e-5)
    assert first["lm_loss"] + first["moe_loss"] == pytest.approx(first["loss"], rel=1e-6)
    assert all(sum(layer["load"]) == pytest.approx(1, abs=1e-5) for layer in first["experts"].values())
    assert trainer.state.log_history[0]["loss"] == first["loss"]


def test_line_of_the_log_has_speed_and_mfu(run_stage, data, tmp_path):
    trainer = run_stage("full", tmp_path / "out", "--max_steps", 2, data=data)
    line = trainer.state.log_history[0]
    assert line["tokens_per_s"] > 0
    assert 0 < line["mfu"] < 1
    assert trainer.state.total_flos > 0


def test_loss_that_is_not_finite_stops_before_anything_is_written(stage_flags, data, tmp_path):
    calls, out = [], tmp_path / "out"

    def broken(head, args, loss):
        calls.append(1)
        return loss * (float("nan") if len(calls) == 3 else 1)

    stage = prepare(stage_flags("full", out, "--save_strategy", "steps", "--save_steps", 1, data=data))
    stage.trainer.model.get_output_embeddings().register_forward_hook(broken)
    with pytest.raises(NonFiniteError, match=r"step 3: rank 0: loss nan for samples \['toy_") as error:
        run(stage)
    assert str(error.value).count("toy_") == 4
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert not (out / "config.json").exists()
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_gradient_that_is_not_finite_stops_before_anything_is_written(stage_flags, data, tmp_path):
    out = tmp_path / "out"
    stage = prepare(stage_flags("full", out, "--save_strategy", "steps", "--save_steps", 1, data=data))
    weight = stage.trainer.model.get_output_embeddings().weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match="losses are finite but the gradient norm is"):
        run(stage)
    assert not list(out.glob("checkpoint-*"))


def test_part_without_gradient_stops_after_the_first_step(stage_flags, data, tmp_path):
    stage = prepare(stage_flags("full", tmp_path / "out", "--max_steps", 2, data=data))
    connector = stage.trainer.model.get_model().mm_projector
    connector.register_forward_hook(lambda module, args, features: features.detach())
    with pytest.raises(ValueError, match="mm_projector should train but got no gradient in the first step"):
        run(stage)


@pytest.mark.parametrize("stage", ["projector", "full", "lora", "moe"])
def test_gradient_checkpointing_with_frozen_parts_changes_nothing(run_stage, data, stage, tmp_path):
    data = None if stage == "projector" else data
    common = ["--max_steps", 2, "--lora_dropout", 0]
    plain = run_stage(stage, tmp_path / "plain", *common, data=data)
    checked = run_stage(stage, tmp_path / "checked", *common, "--gradient_checkpointing", True, data=data)
    assert losses(checked) == pytest.approx(losses(plain), rel=1e-6)
    for name, weight in weights(checked).items():
        torch.testing.assert_close(weight, weights(plain)[name], rtol=1e-4, atol=1e-6, msg=name)


def test_learning_rates_reach_their_parts(run_stage, data, tmp_path):
    trainer = run_stage("full", tmp_path / "out", "--mm_projector_lr", 5e-4, "--max_steps", 1, data=data)
    rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"embeddings": 1e-3, "decoder": 1e-3, "mm_projector": 5e-4}


def test_tower_trains_with_a_rate_of_its_own(run_stage, data, tmp_path):
    more = ["--unfreeze_mm_vision_tower", True, "--mm_vision_tower_lr", 1e-4, "--max_steps", 2]
    trainer = run_stage("full", tmp_path / "out", *more, data=data)
    assert {g["name"]: g["lr"] for g in trainer.optimizer.param_groups}["vision_tower"] == 1e-4
    assert trainer.model.config.unfreeze_mm_vision_tower is True


def test_batches_are_of_one_modality_where_grouped(run_stage, data, tmp_path):
    trainer = run_stage("full", tmp_path / "out", "--group_by_modality_length", True, "--max_steps", 1, data=data)
    order = list(trainer._get_train_sampler())
    has_image = trainer.train_dataset.has_image
    # 16 records with an image and 8 without, in batches of 4: nothing is left over.
    batches = [{bool(has_image[i]) for i in order[start : start + 4]} for start in range(0, 24, 4)]
    assert all(len(kinds) == 1 for kinds in batches)


def test_run_is_the_same_run_twice(run_stage, data, tmp_path):
    first = run_stage("moe", tmp_path / "a", data=data)
    again = run_stage("moe", tmp_path / "b", data=data)
    assert losses(first) == losses(again)
    for name, weight in weights(first).items():
        assert torch.equal(weight, weights(again)[name])


def test_tensorboard_gets_the_experts(run_stage, data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    more = ["--report_to", "tensorboard", "--logging_dir", out / "tb", "--max_steps", 2]
    run_stage("moe", out, *more, data=data)
    events = EventAccumulator(str(out / "tb"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "train/moe_loss", "train/tokens_per_s", "train/mfu"} <= set(tags)
    assert {"train/moe_layer_0/load_0", "train/moe_layer_2/dead", "train/moe_layer_2/balance_loss"} <= set(tags)
