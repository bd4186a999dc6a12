"""What was due when a run was stopped is done when it resumes: it becomes the run that was never stopped."""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from llava_lite.train.saving import checkpoint as checkpoints
from llava_lite.train.saving.due import DueWork
from llava_lite.train.saving.interrupt import EXIT_RESUMABLE
from llava_lite.train.saving.resume import find_checkpoint

HERE = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("plain_run", HERE / "plain_run.py")
plain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain)

# Of 11 steps an epoch.
RUNS = {
    "steps": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    },
    "evaluation alone": {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 4, "eval_on_start": True},
    "epochs": {
        "num_train_epochs": 2,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_strategy": "epoch",
        "load_best_model_at_end": True,
    },
    # Saved after the last step of an epoch, evaluated and logged at its end.
    "mixed": {"num_train_epochs": 2, "eval_strategy": "epoch", "logging_strategy": "epoch", "save_steps": 11},
    "best": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", "metric_for_best_model": "loss"},
}
CLOCK = ("runtime", "per_second")


class Signal(TrainerCallback):
    """Sends a signal to this process at a step: when the step ends, or in a batch of the evaluation after it."""

    def __init__(self, step, batch=None, number=signal.SIGTERM):
        self.step, self.batch, self.number, self.batches = step, batch, number, 0

    def on_step_end(self, args, state, control, **kwargs):
        """Send it before the run looks for one."""
        if state.global_step == self.step and self.batch is None:
            self.send()

    def on_prediction_step(self, args, state, control, **kwargs):
        """Send it in the middle of the evaluation."""
        if state.global_step == self.step:
            self.batches += 1
            if self.batches == self.batch:
                self.send()

    def send(self):
        """Send it, and wait until another thread has taken it."""
        os.kill(os.getpid(), self.number)
        time.sleep(0.2)


class Drawn(plain.Sequences):
    """Sequences that each move the random state when they are read, as an augmentation does."""

    def __getitem__(self, i):
        torch.rand(1)
        return super().__getitem__(i)


def start(directory, run, *callbacks, **more):
    """Return a trainer of a run; the callbacks come before ours."""
    trainer = plain.build_trainer(directory, callbacks=callbacks, **(RUNS[run] | more))
    trainer.eval_dataset = Drawn()
    return trainer


def facts(trainer):
    """Return all that two runs must have in common."""
    state, callbacks = trainer.state, trainer.callback_handler.callbacks
    optimizer = trainer.optimizer.state_dict()["state"]
    return {
        "log": [{k: v for k, v in line.items() if not k.endswith(CLOCK)} for line in state.log_history],
        "weights": {name: digest(weight) for name, weight in trainer.model.state_dict().items()},
        "optimizer": {f"{i}.{k}": digest(torch.as_tensor(v)) for i, own in optimizer.items() for k, v in own.items()},
        "random": digest(torch.get_rng_state()),
        "best": (state.best_metric, state.best_global_step, Path(state.best_model_checkpoint or "").name),
        "early stopping": [one.state() for one in callbacks if isinstance(one, EarlyStoppingCallback)],
        "step": state.global_step,
    }


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def stop(trainer, **arguments):
    """Train until the signal ends the run."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with pytest.raises(SystemExit) as end:
        trainer.train(**arguments)
    assert end.value.code == EXIT_RESUMABLE
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == handlers
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """Return a function: name of a run -> what it is if nothing stops it, and its directory."""
    known = {}

    def get(run, **more):
        key = (run, *sorted(more.items()))
        if key not in known:
            directory = tmp_path_factory.mktemp("full")
            trainer = start(directory, run, *patience(run), **more)
            trainer.train()
            known[key] = facts(trainer), directory
        return known[key]

    return get


def patience(run):
    """Return the callback that counts evaluations without progress, for runs that have a best model."""
    return [EarlyStoppingCallback(50)] if run in ("steps", "epochs") else []


def resume(directory, run, **more):
    """Resume a stopped run from its newest checkpoint and return what it is at its end."""
    resumed = start(directory, run, *patience(run), **more)
    torch.rand(3)
    resumed.train(resume_from_checkpoint=True)
    return facts(resumed)


def get_id(value):
    """Return the name of a part of a case, None for pytest's own."""
    return f"{value.step}-{value.batch}" if isinstance(value, Signal) else None


WORKERS = {"dataloader_num_workers": 2}
# Ended in a step after which an evaluation is due, or in a batch of it.
CASES = [
    ("steps", Signal(4), {}),
    ("steps", Signal(6, batch=2), {}),
    ("steps", Signal(5), {}),
    ("steps", Signal(11), {}),
    ("steps", Signal(11, batch=1), {}),
    pytest.param("steps", Signal(6, batch=3), WORKERS, marks=pytest.mark.slow),
    ("evaluation alone", Signal(6), {}),
    ("evaluation alone", Signal(9, batch=1), {}),
    ("epochs", Signal(11), {}),
    pytest.param("epochs", Signal(11, batch=1), WORKERS, marks=pytest.mark.slow),
    ("epochs", Signal(22, batch=2), {}),
    ("mixed", Signal(11), {}),
    ("mixed", Signal(11, batch=2), {}),
    ("best", Signal(8), {}),
]


@pytest.mark.parametrize(("run", "sent", "more"), CASES, ids=get_id)
def test_a_run_that_is_stopped_at_an_evaluation_becomes_the_one_never_stopped(
    never_stopped, tmp_path, run, sent, more
):
    stop(start(tmp_path, run, *patience(run), sent, **more))
    assert resume(tmp_path, run, **more) == never_stopped(run, **more)[0]


def test_an_evaluation_that_is_interrupted_twice_is_still_made(never_stopped, tmp_path):
    stop(start(tmp_path, "epochs", *patience("epochs"), Signal(11, batch=2)))
    stop(start(tmp_path, "epochs", *patience("epochs"), Signal(11, batch=1)), resume_from_checkpoint=True)
    assert resume(tmp_path, "epochs") == never_stopped("epochs")[0]


@pytest.mark.parametrize("run", ["mixed", "steps"])
def test_a_run_that_is_killed_after_a_save_becomes_the_one_never_stopped(never_stopped, tmp_path, run):
    expected, directory = never_stopped(run)
    step = 11 if run == "mixed" else 6
    for path in directory.glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) <= step:
            shutil.copytree(path, tmp_path / path.name)
    assert resume(tmp_path, run) == expected


def test_without_what_is_due_the_evaluation_and_the_end_of_the_epoch_would_be_missing(
    never_stopped, tmp_path, monkeypatch
):
    stop(start(tmp_path, "mixed", Signal(11)))
    monkeypatch.setattr(checkpoints.CheckpointMixin, "do_due_work", lambda trainer: None)
    found, expected = resume(tmp_path, "mixed"), never_stopped("mixed")[0]
    assert [line["step"] for line in found["log"] if "eval_loss" in line] == [22]
    assert [line["step"] for line in expected["log"] if "eval_loss" in line] == [11, 22]


def test_without_the_random_state_after_it_the_next_step_would_be_another(never_stopped, tmp_path, monkeypatch):
    # No save is due at this step, which would keep the state after the evaluation.
    stop(start(tmp_path, "evaluation alone", Signal(6, batch=2)))
    monkeypatch.setattr(DueWork, "keep_random_state", lambda due: None)
    found, expected = resume(tmp_path, "evaluation alone"), never_stopped("evaluation alone")[0]
    assert {key for key in found if found[key] != expected[key]} >= {"weights", "log"}


def test_an_evaluation_after_which_a_run_stops_early_still_stops_it(tmp_path):
    # Of losses that fall every one is worse than the first.
    worse = {"greater_is_better": True, "learning_rate": 1e-3}
    full = start(tmp_path / "full", "steps", EarlyStoppingCallback(2), **worse)
    full.train()
    assert full.state.global_step == 6
    for number, sent in enumerate([Signal(6), Signal(6, batch=2), Signal(4)]):
        directory = tmp_path / str(number)
        stop(start(directory, "steps", EarlyStoppingCallback(2), sent, **worse))
        resumed = start(directory, "steps", EarlyStoppingCallback(2), **worse)
        resumed.train(resume_from_checkpoint=True)
        assert facts(resumed) == facts(full)
    # Saved when it had been decided; a run that dies right after has no step to go.
    again = start(tmp_path / "again", "steps", EarlyStoppingCallback(2), **worse)
    again.train(resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-6"))
    assert again.state.global_step == 6
    longer = start(tmp_path / "longer", "steps", num_train_epochs=2, **worse)
    longer.train(resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-6"))
    assert longer.state.global_step == 22


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_every_signal_saves_and_is_named(tmp_path, caplog, number):
    stop(start(tmp_path, "best", Signal(5, number=number)))
    assert find_checkpoint(tmp_path, True) == str(tmp_path / "checkpoint-5")
    assert f"{number.name}: {tmp_path}/checkpoint-5 is saved, leaving with code 75" in caplog.text


def test_a_signal_in_the_evaluation_before_the_first_step_has_nothing_to_save(tmp_path, caplog):
    stop(start(tmp_path, "evaluation alone", Signal(0, batch=1)))
    assert not list(tmp_path.glob("checkpoint-*"))
    assert "SIGTERM before the first step: nothing to save, leaving with code 75" in caplog.text


def test_the_state_of_a_checkpoint_says_what_is_due(tmp_path):
    stop(start(tmp_path, "steps", Signal(6, batch=1)))
    due = torch.load(tmp_path / "checkpoint-6" / "progress_0.pt", weights_only=True)["due"]
    assert (due["place"], due["evaluate"], due["save"]) == ("step", True, True)
    log = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in log if "eval_loss" in line] == [2, 4]


ONLY_MODEL = {"save_only_model": True}


@pytest.mark.parametrize(
    ("run", "sent"),
    # Between two saves, at one, in the evaluation before one, and in the evaluation after one of the same step.
    [("steps", Signal(5)), ("steps", Signal(4)), ("steps", Signal(6, batch=2)), ("mixed", Signal(11, batch=2))],
    ids=get_id,
)
def test_after_a_signal_a_checkpoint_can_be_resumed_though_the_others_hold_the_model_alone(
    never_stopped, tmp_path, run, sent
):
    expected, directory = never_stopped(run, **ONLY_MODEL)
    assert all(not (path / "optimizer.pt").exists() for path in directory.glob("checkpoint-*"))
    stop(start(tmp_path, run, *patience(run), sent, **ONLY_MODEL))
    # Where no signal came the flag does what it says.
    whole = [path.name for path in tmp_path.glob("checkpoint-*") if (path / "optimizer.pt").exists()]
    assert whole == [f"checkpoint-{sent.step}"]
    assert resume(tmp_path, run, **ONLY_MODEL) == expected


@pytest.mark.parametrize(
    ("wanted", "says"), [(None, False), ("True", False), ("False", True), ("x/checkpoint-2", True)]
)
def test_the_last_words_name_a_flag_that_would_keep_the_same_command_from_going_on(tmp_path, caplog, wanted, says):
    stop(start(tmp_path, "best", Signal(5), resume_from_checkpoint=wanted))
    advice = f"To continue from it, leave --resume_from_checkpoint {wanted} out of the command."
    assert (advice in caplog.text) == says


WITHOUT_EVALUATION = {"eval_strategy": "no", "load_best_model_at_end": False}


@pytest.mark.parametrize("sent", [Signal(6), Signal(6, batch=2)], ids=get_id)
def test_an_evaluation_that_is_due_needs_the_flags_that_it_was_made_by(tmp_path, sent):
    stop(start(tmp_path, "steps", sent))
    again = start(tmp_path, "steps", **WITHOUT_EVALUATION)
    again.eval_dataset = None
    with pytest.raises(
        ValueError, match=r"checkpoint-6 was saved when the evaluation after step 6 .*--eval_data_path "
    ):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 0


def test_where_no_evaluation_is_due_a_run_goes_on_without_one(tmp_path):
    stop(start(tmp_path, "steps", Signal(5)))
    again = start(tmp_path, "steps", **WITHOUT_EVALUATION)
    again.eval_dataset = None
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 11
