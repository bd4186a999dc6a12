"""A save is complete or absent, whatever happens in it; what could not be resumed exactly is refused."""

import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from llava_lite.train.saving import manifest as paper
from llava_lite.train.saving.interrupt import EXIT_RESUMABLE
from llava_lite.train.saving.manifest import BrokenCheckpoint, SaveError, newest_complete_checkpoint
from llava_lite.train.saving.resume import find_checkpoint

HERE = Path(__file__).parents[1]
STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "progress_0.pt", "trainer_state.json")


def load_plain_run():
    """Import the neighbour file that the scripts use too."""
    spec = importlib.util.spec_from_file_location("plain_run", HERE / "plain_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plain = load_plain_run()


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    """A run of 11 steps with checkpoints 2, 4, ... 10 and 11, and its trainer."""
    directory = tmp_path_factory.mktemp("full")
    trainer = plain.build_trainer(directory)
    trainer.train()
    return directory, trainer


@pytest.fixture
def copied(full_run, tmp_path):
    """A copy of checkpoints 4 and 8 of the full run, to harm."""
    for step in (4, 8):
        shutil.copytree(full_run[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path


def assert_same_run(trainer, full):
    """Compare weights bit for bit, and every logged loss."""
    expected = plain.get_weights(full)
    assert all(torch.equal(weight, expected[name]) for name, weight in plain.get_weights(trainer).items())
    assert plain.get_losses(trainer) == plain.get_losses(full)


# What is in it.


def test_a_checkpoint_holds_what_trains_and_all_state_and_no_frozen_weight(full_run):
    directory, trainer = full_run
    saved = load_file(directory / "checkpoint-4" / "trained.safetensors")
    assert sorted(saved) == [name for name, p in sorted(trainer.model.named_parameters()) if p.requires_grad]
    names = set(os.listdir(directory / "checkpoint-4"))
    assert names >= {*STATE, "manifest.json"}
    manifest = json.loads((directory / "checkpoint-4" / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"]) == (4, 1)
    assert set(manifest["files"]) == names - {"manifest.json"}
    modes = {path.stat().st_mode for path in (directory / "checkpoint-4").iterdir()}
    assert len(modes) == 1


def test_only_so_many_checkpoints_are_kept_and_the_best_among_them(tmp_path):
    trainer = plain.build_trainer(
        tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, save_total_limit=2, max_steps=8
    )
    # Evaluations of which step 4 was the best.
    scores = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5}
    trainer._evaluate = lambda *args, **kwargs: {"eval_loss": scores[trainer.state.global_step]}
    trainer.train()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4", "checkpoint-8"]
    saved = load_file(tmp_path / "checkpoint-4" / "trained.safetensors")
    assert all(torch.equal(trainer.model.state_dict()[name], weight) for name, weight in saved.items())


def test_a_run_killed_between_its_last_save_and_the_deletion_deletes_when_it_is_started_again(tmp_path):
    class Killed(BaseException):
        """Ends the process, as far as the code under test can tell."""

    arguments = {"save_total_limit": 2, "max_steps": 8}
    killed = plain.build_trainer(tmp_path, **arguments)
    prune = paper.prune

    def prune_unless_killed(*args, **kwargs):
        if killed.state.global_step == 8:
            raise Killed
        prune(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "prune", prune_unless_killed)
        with pytest.raises(Killed):
            killed.train()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]
    plain.build_trainer(tmp_path, **arguments).train(resume_from_checkpoint=True)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-6", "checkpoint-8"]


def test_a_checkpoint_that_is_named_to_resume_from_is_kept_by_a_run_that_saves_none(tmp_path):
    plain.build_trainer(tmp_path, max_steps=8).train()
    again = plain.build_trainer(tmp_path, max_steps=8, save_total_limit=1, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4", "checkpoint-8"]


def test_checkpoints_that_cannot_be_deleted_are_named_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / "checkpoint-2"))

    monkeypatch.setattr(paper, "prune", refuse)
    plain.build_trainer(tmp_path, max_steps=4, save_total_limit=1).train()
    plain.build_trainer(tmp_path, max_steps=4, save_total_limit=1).train(resume_from_checkpoint=True)
    lines = [record.getMessage() for record in caplog.records if "save_total_limit" in record.getMessage()]
    # At both saves, and at the end of the run that is resumed.
    assert len(lines) == 3
    assert all("checkpoint-2" in line and "delete them yourself" in line for line in lines)
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_a_best_checkpoint_that_was_damaged_since_is_named_and_not_loaded(tmp_path):
    class Damage(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                path = tmp_path / "checkpoint-4" / "trained.safetensors"
                path.write_bytes(path.read_bytes()[:-1] + b"\x01")

    arguments = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "max_steps": 8}
    trainer = plain.build_trainer(tmp_path, callbacks=[Damage()], **arguments)
    trainer._evaluate = lambda *args, **kwargs: {"eval_loss": abs(trainer.state.global_step - 4)}
    with pytest.raises(
        BrokenCheckpoint, match=r"checkpoint-4 is not complete: trained\.safetensors has the right size"
    ):
        trainer.train()


# Resuming.


@pytest.mark.parametrize("step", [4, 10, 11])
def test_a_resumed_run_is_the_same_run_also_between_two_logged_steps(full_run, tmp_path, step):
    resumed = plain.build_trainer(tmp_path)
    result = resumed.train(resume_from_checkpoint=str(full_run[0] / f"checkpoint-{step}"))
    assert_same_run(resumed, full_run[1])
    assert result.metrics["train_loss"] == full_run[1].state.log_history[-1]["train_loss"]


def test_without_the_loss_since_the_last_log_the_next_line_would_differ(full_run, tmp_path):
    resumed = plain.build_trainer(tmp_path)
    load_progress = resumed.progress.load

    def forgetful_load(path):
        load_progress(path)
        resumed.progress.saved.update(loss_since_log=torch.zeros(()), last_logged_step=4)

    resumed.progress.load = forgetful_load
    resumed.train(resume_from_checkpoint=str(full_run[0] / "checkpoint-4"))
    assert plain.get_losses(resumed) != plain.get_losses(full_run[1])


def test_what_a_save_that_was_killed_has_left_stops_no_run_that_names_its_checkpoint(full_run, tmp_path):
    (tmp_path / "tmp-checkpoint-6").mkdir()
    (tmp_path / "tmp-checkpoint-6" / "optimizer.pt").write_bytes(b"half")
    resumed = plain.build_trainer(tmp_path, max_steps=6)
    resumed.train(resume_from_checkpoint=str(full_run[0] / "checkpoint-4"))
    assert os.listdir(tmp_path) == ["checkpoint-6"]


def test_time_and_speed_of_a_resumed_run_are_those_of_the_full_run(full_run, tmp_path):
    resumed = plain.build_trainer(tmp_path)
    result = resumed.train(resume_from_checkpoint=str(full_run[0] / "checkpoint-10"))
    seconds = torch.load(full_run[0] / "checkpoint-10" / "progress_0.pt", weights_only=True)["seconds"]
    assert result.metrics["train_runtime"] >= round(seconds, 4) > 0


def test_true_takes_the_newest_complete_checkpoint_and_names_the_broken_file_of_another(copied, full_run, caplog):
    (copied / "checkpoint-8" / "optimizer.pt").write_bytes(b"half")
    resumed = plain.build_trainer(copied)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, full_run[1])
    assert "checkpoint-8 is not complete: optimizer.pt has 4 bytes" in caplog.text


@pytest.mark.parametrize("wanted", [None, True, "True"])
def test_the_newest_is_found_without_being_named(copied, wanted):
    assert find_checkpoint(copied, wanted) == str(copied / "checkpoint-8")


def test_a_run_without_checkpoints_begins_and_true_demands_one(tmp_path):
    assert find_checkpoint(tmp_path / "no such directory", None) is None
    assert find_checkpoint(tmp_path, "False") is None
    with pytest.raises(ValueError, match=r"holds no checkpoint-N"):
        find_checkpoint(tmp_path, True)


def test_a_named_checkpoint_must_be_complete_and_be_one(copied):
    with pytest.raises(ValueError, match=r"holds some: name one of \['checkpoint-8', 'checkpoint-4'\]"):
        find_checkpoint(copied, str(copied))
    (copied / "checkpoint-4" / "rng_state.pth").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4 is not complete: rng_state\.pth is missing"):
        find_checkpoint(copied, str(copied / "checkpoint-4"))


# Refusals.


@pytest.mark.parametrize("name", STATE)
def test_state_that_was_never_saved_is_refused(copied, tmp_path, name):
    directory = copied / "checkpoint-8"
    (directory / name).unlink()
    manifest = json.loads((directory / paper.MANIFEST).read_text())
    del manifest["files"][name]
    paper.write_manifest(directory, manifest)
    with pytest.raises(ValueError, match=rf"cannot be resumed: it holds no {name}"):
        plain.build_trainer(tmp_path / "new").train(resume_from_checkpoint=str(directory))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size was 1, is 2"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps was 2, is 1"),
        ({"seed": 1}, "seed was 42, is 1"),
        ({"data_seed": 1}, "data_seed was None, is 1"),
    ],
)
def test_a_run_that_divides_its_work_otherwise_is_refused(full_run, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        plain.build_trainer(tmp_path, **changed).train(resume_from_checkpoint=str(full_run[0] / "checkpoint-4"))


def test_another_number_of_ranks_with_smaller_steps_is_refused(copied, tmp_path):
    directory = copied / "checkpoint-8"
    manifest = json.loads((directory / paper.MANIFEST).read_text())
    manifest["steps"]["world_size"] = 2
    paper.write_manifest(directory, manifest)
    with pytest.raises(ValueError, match=r"give --per_device_train_batch_size 1 --gradient_accumulation_steps 4"):
        plain.build_trainer(tmp_path / "new").train(resume_from_checkpoint=str(directory))


def test_a_run_that_trains_something_else_is_refused(full_run, tmp_path):
    model = plain.build_model()
    model.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"trained parameters: no longer \['lm_head.weight'\] \(1 in all\)"):
        plain.build_trainer(tmp_path, model).train(resume_from_checkpoint=str(full_run[0] / "checkpoint-4"))


def test_another_base_model_is_refused(full_run, tmp_path):
    other = plain.build_trainer(tmp_path, plain.build_model(seed=1))
    with pytest.raises(ValueError, match=r"frozen weights differ.*first model\.embed_tokens\.weight.*--model_name"):
        other.train(resume_from_checkpoint=str(full_run[0] / "checkpoint-4"))


def test_a_longer_schedule_is_allowed_and_reported(full_run, tmp_path, caplog):
    longer = plain.build_trainer(tmp_path, num_train_epochs=2)
    longer.train(resume_from_checkpoint=str(full_run[0] / "checkpoint-10"))
    assert longer.state.global_step == 22
    assert "num_train_epochs was 1, is 2" in caplog.text


def test_a_run_that_has_all_its_steps_takes_no_other(full_run, tmp_path):
    again = plain.build_trainer(tmp_path, max_steps=8)
    again.train(resume_from_checkpoint=str(full_run[0] / "checkpoint-8"))
    assert again.state.global_step == 8


def test_the_interrupt_checkpoint_of_transformers_and_ours_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="--enable_jit_checkpoint"):
        plain.build_trainer(tmp_path, enable_jit_checkpoint=True)


# Trouble in a save.


class AtStep(TrainerCallback):
    """Does something when a step ends, before its save."""

    def __init__(self, step, work):
        self.step, self.work = step, work

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.work()


def test_a_full_disk_before_the_save_ends_the_run_with_both_numbers(tmp_path, monkeypatch):
    def fill():
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(paper.shutil, "disk_usage", lambda path: usage._replace(free=1234))

    trainer = plain.build_trainer(tmp_path, callbacks=[AtStep(4, fill)])
    with pytest.raises(
        SaveError, match=r"[\d,]{5,} bytes are needed, 1,234 are free.*Earlier checkpoints are untouched"
    ):
        trainer.train()
    assert os.listdir(tmp_path) == ["checkpoint-2"]
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("limit_bytes", [0, 3000, 12000])
def test_a_disk_that_fills_up_during_the_save_leaves_the_checkpoint_before_it(tmp_path, limit_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = AtStep(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard)))
    trainer = plain.build_trainer(tmp_path, callbacks=[fill])
    try:
        with pytest.raises(SaveError, match="Earlier checkpoints are untouched; make room and resume"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["checkpoint-2"]
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_sigterm_saves_within_the_step_and_leaves_with_the_documented_code(full_run, tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    def terminate():
        os.kill(os.getpid(), signal.SIGTERM)
        # The kernel may give it to a thread of another library, which has to wake up first.
        time.sleep(0.2)

    terminated = plain.build_trainer(tmp_path, callbacks=[AtStep(5, terminate)])
    try:
        with pytest.raises(SystemExit) as stop:
            terminated.train()
    finally:
        signal.sigtimedwait({signal.SIGTERM}, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == EXIT_RESUMABLE == 75
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    resumed = plain.build_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, full_run[1])


def environment():
    """Return the environment of a script that finds this package."""
    paths = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def run_script(name, *arguments, timeout_s):
    """Run a neighbour script and return its RESULT."""
    command = [sys.executable, str(HERE / name), *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


def assert_survived(result):
    """Check that no kill left half a checkpoint or lost one, and that the runs came out as one never killed."""
    assert all(found["killed"] for found in result["rounds"])
    assert [found["broken"] for found in result["rounds"] if found["broken"]] == []
    assert all(found["after"] >= found["before"] for found in result["rounds"])
    left = ["checkpoint-43", "checkpoint-44"]
    assert [run for run in result["runs"] if run != {"weights": True, "losses": True, "left": left}] == []


def test_a_kill_at_any_place_of_a_save_costs_no_checkpoint(tmp_path):
    assert_survived(run_script("killed_saves.py", tmp_path, 1, 4, timeout_s=300))


@pytest.mark.slow
def test_a_hundred_kills_cost_no_checkpoint(tmp_path):
    assert_survived(run_script("killed_saves.py", tmp_path, 9, 25, timeout_s=3600))


def test_sigterm_to_the_process_tree_saves_although_the_loader_has_workers(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); from plain_run import build_trainer; "
        f"build_trainer({str(tmp_path)!r}, num_train_epochs=2000, save_steps=10**6, dataloader_num_workers=2, "
        "logging_steps=1).train()"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(), start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    try:
        next(line for line in run.stdout if "'loss'" in line)
        time.sleep(0.5)
        os.killpg(run.pid, signal.SIGTERM)
        run.communicate(timeout=60)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == EXIT_RESUMABLE
    assert newest_complete_checkpoint(tmp_path) is not None
