"""A run that is taken up steps at the rates of its own flags: prolonged, and with another rate than it began with."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DummyOptim
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR

from llava_lite.model import LlavaLlamaForCausalLM
from llava_lite.train.saving.final import set_averaged_weights
from llava_lite.train.saving.schedule import get_settings, set_rates, warn_if_rate_is_zero
from llava_lite.train.train import prepare

SAVING = ["--save_strategy", "steps", "--save_steps", "2", "--lr_scheduler_type", "cosine", "--learning_rate", "1e-3"]


def cosine(step, num_steps, peak=1e-3):
    """Return the rate of a step, counted from 0, of a cosine without warm-up."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def rates(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["learning_rate"] for line in lines if "loss" in line]


# How long a run was (24 records, 4 a step), how long it is then, in steps.
@pytest.mark.parametrize(
    ("first", "then", "num_first", "num_then"),
    [
        (["--max_steps", "4"], ["--max_steps", "8"], 4, 8),
        (["--num_train_epochs", "1"], ["--num_train_epochs", "2"], 6, 12),
        (["--num_train_epochs", "1"], ["--max_steps", "8"], 6, 8),
    ],
)
def test_a_prolonged_run_resumes_at_the_rate_of_the_longer_schedule(
    first, then, num_first, num_then, run_stage, tmp_path
):
    run_stage("full", tmp_path / "out", *SAVING, *first)
    assert rates(tmp_path / "out") == pytest.approx([cosine(i, num_first) for i in range(num_first)])
    before = run_stage("full", tmp_path / "out", *SAVING, *then)
    expected = [cosine(i, num_first if i < num_first else num_then) for i in range(num_then)]
    assert rates(tmp_path / "out") == pytest.approx(expected)
    assert before.state.global_step == num_then
    assert all(rate > 0 for rate in rates(tmp_path / "out")[num_first:])


def test_another_peak_rate_and_decay_hold_from_the_checkpoint_on(run_stage, tmp_path):
    flags = [*SAVING, "--max_steps", "4", "--weight_decay", "0.1"]
    run_stage("full", tmp_path / "out", *flags)
    changed = [
        *flags,
        "--max_steps",
        "8",
        "--learning_rate",
        "5e-3",
        "--weight_decay",
        "0.2",
        "--mm_projector_lr",
        "1e-4",
    ]
    trainer = run_stage("full", tmp_path / "out", *changed)
    assert rates(tmp_path / "out")[4:] == pytest.approx([cosine(i, 8, 5e-3) for i in range(4, 8)])
    last = cosine(8, 8)
    for group in trainer.optimizer.param_groups:
        assert group["weight_decay"] == (0.0 if group["name"].endswith("no_decay") else 0.2)
        assert group["initial_lr"] == (1e-4 if group["name"].startswith("mm_projector") else 5e-3)
        assert group["lr"] == pytest.approx(last, abs=1e-12)


def test_decay_that_changes_the_groups_is_refused_in_a_sentence(run_stage, tmp_path):
    run_stage("full", tmp_path / "out", *SAVING, "--max_steps", "2")
    words = r"cannot be resumed: --weight_decay was 0.0, is 0.1, and the optimizer was saved without groups of weights"
    with pytest.raises(ValueError, match=words):
        run_stage("full", tmp_path / "out", *SAVING, "--max_steps", "4", "--weight_decay", "0.1")


def toy_schedule(factor, peak=0.5):
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": peak, "weight_decay": 0.3}])
    return optimizer, LambdaLR(optimizer, factor)


def test_equal_flags_change_nothing(caplog):
    optimizer, scheduler = toy_schedule(lambda step: 1 / (1 + step))
    settings, base_rates = get_settings(optimizer), list(scheduler.base_lrs)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    before = dict(optimizer.param_groups[0]), scheduler.get_last_lr()
    with caplog.at_level("INFO"):
        set_rates(optimizer, scheduler, settings, base_rates)
    assert (dict(optimizer.param_groups[0]), scheduler.get_last_lr()) == before
    assert caplog.text == ""


def test_the_settings_of_an_optimizer_of_the_deepspeed_json_are_noted(stage_flags, tmp_path):
    trainer = prepare(stage_flags("full", tmp_path, "--max_steps", 4)).trainer
    # Trainer has a stand-in for it, and DeepSpeed hands its own to the schedule.
    trainer.optimizer = DummyOptim(trainer.model.parameters())
    own = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(1))], "weight_decay": 0.3}], lr=0.5)
    trainer.create_scheduler(4, optimizer=own)
    assert [group["weight_decay"] for group in trainer.follow_flags.settings] == [0.3]
    assert trainer.follow_flags.base_rates == [0.5]


class CountingAdamW(torch.optim.AdamW):
    """Counts its steps in its groups, as a schedule-free optimizer does."""

    def __init__(self, params, lr=1e-3, **settings):
        super().__init__(params, lr=lr, **settings)
        for group in self.param_groups:
            group["k"] = 0

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["k"] += 1


def test_a_setting_follows_the_flags_and_what_the_optimizer_counts_follows_the_checkpoint():
    def make(decay):
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = CountingAdamW([{"params": [weight], "weight_decay": decay}], betas=(0.9, 0.95))
        return optimizer, LambdaLR(optimizer, lambda step: 1.0)

    saved, saved_scheduler = make(0.1)
    for _ in range(3):
        saved.step()
        saved_scheduler.step()
    optimizer, scheduler = make(0.2)
    settings, base_rates = get_settings(optimizer), list(scheduler.base_lrs)
    optimizer.load_state_dict(saved.state_dict())
    scheduler.load_state_dict(saved_scheduler.state_dict())
    set_rates(optimizer, scheduler, settings, base_rates)
    group = optimizer.param_groups[0]
    assert (group["k"], group["weight_decay"], group["betas"], group["initial_lr"]) == (3, 0.2, (0.9, 0.95), 1e-3)


class Averaging(CountingAdamW):
    """A schedule-free optimizer, whose averaged weights are twice those that it trains."""

    def __init__(self, params, warmup_steps=0, weight_lr_power=2.0, r=0.0, **settings):
        super().__init__(params, **settings)
        for group in self.param_groups:
            group["train_mode"] = False

    def set_mode(self, train_mode):
        for group in self.param_groups:
            if group["train_mode"] != train_mode:
                for weight in group["params"]:
                    weight.data.mul_(0.5 if train_mode else 2)
            group["train_mode"] = train_mode

    def train(self):
        self.set_mode(True)

    def eval(self):
        self.set_mode(False)


EVALUATING = ["--eval_split", "4", "--eval_strategy", "steps", "--load_best_model_at_end", "True"]


# The best model was saved after its evaluation, which sets the averaged weights.
@pytest.mark.parametrize(("more", "factor"), [([], 2), ([*EVALUATING, "--eval_steps", "2"], 1)])
def test_the_final_model_of_a_schedule_free_optimizer_is_the_averaged_one(
    run_stage, tmp_path, monkeypatch, more, factor
):
    package = SimpleNamespace(AdamWScheduleFree=Averaging, SGDScheduleFree=None)
    monkeypatch.setitem(sys.modules, "schedulefree", package)
    monkeypatch.setattr("transformers.trainer_optimizer.is_schedulefree_available", lambda *version: True)
    flags = [*SAVING, "--optim", "schedule_free_adamw", "--max_steps", "4"]
    run_stage("full", tmp_path / "out", *flags, *more)
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    # The weights of a checkpoint are those that go on training, or those that were just evaluated.
    checkpoint = state["best_model_checkpoint"] or tmp_path / "out/checkpoint-4"
    assert (state["best_model_checkpoint"] is not None) == (factor == 1)
    trained = load_file(Path(checkpoint) / "trained.safetensors")
    saved = dict(LlavaLlamaForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    assert all(torch.equal(saved[name], factor * weight) for name, weight in trained.items())


@pytest.mark.parametrize(
    ("load_best", "best", "num_averaged"), [(False, None, 1), (True, "out/checkpoint-2", 0), (True, None, 1)]
)
def test_the_averaged_weights_are_set_unless_the_best_model_was_loaded(load_best, best, num_averaged):
    calls = []
    trainer = SimpleNamespace(
        optimizer=SimpleNamespace(eval=lambda: calls.append("eval")),
        args=SimpleNamespace(load_best_model_at_end=load_best),
        # None: its checkpoint was deleted while the run went on, and the Trainer loads nothing.
        state=SimpleNamespace(best_model_checkpoint=best),
    )
    set_averaged_weights(trainer)
    assert len(calls) == num_averaged


@pytest.mark.parametrize(
    ("factors", "step", "num_steps", "reported"),
    [
        # The only step of a run with warm-up, as --warmup_steps 0.03 makes it.
        ([0], 0, 1, True),
        ([0, 1], 0, 2, False),
        ([1], 0, 1, False),
        ([1, 0, 0], 1, 3, True),
        # Nothing is left to do.
        ([0], 1, 1, False),
    ],
)
def test_steps_that_are_all_taken_at_rate_zero_are_reported(factors, step, num_steps, reported, caplog):
    _, scheduler = toy_schedule(lambda i: factors[min(i, len(factors) - 1)])
    warn_if_rate_is_zero(scheduler, step, num_steps)
    assert ("nothing is trained. Give --warmup_steps 0" in caplog.text) == reported
