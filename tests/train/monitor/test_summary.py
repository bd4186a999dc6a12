"""What a run reports at its end, and when it is started again though it is finished."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from llava_lite.train.monitor import summary as ending
from llava_lite.train.monitor.summary import (
    chat_command,
    evaluation_line,
    finished_before,
    loss_line,
)
from llava_lite.train.train import main

EPOCH = ["--save_strategy", "epoch"]


@pytest.mark.usefixtures("plots")
def test_a_run_ends_with_what_it_made_and_how_to_chat_with_it(stage_flags, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(ending.shutil, "which", lambda name: f"/bin/{name}")
    directory = tmp_path / "my out"
    flags = stage_flags("projector", "OUT", "--eval_split", "4", "--eval_strategy", "epoch")
    with caplog.at_level(logging.INFO):
        main([str(directory) if word == "OUT" else word for word in flags])
    (output,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("finished")]
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    (evaluated,) = [line["eval_loss"] for line in lines if "eval_loss" in line]
    head, *rows = output.splitlines()
    rows = {row[2:14].strip(): row[14:] for row in rows}
    # 20 records of 4 a step.
    assert head == "finished: 5 steps, 1 epoch"
    assert rows["model"] == f"{directory} (trained weights; their base is opened with them)"
    assert rows["loss"] == f"{losses[-1]:.4f} at the end, {losses[0]:.4f} at the start"
    assert rows["evaluation"] == f"loss {evaluated:.4f}"
    assert rows["chat"] == f"llava-lite chat '{directory}' (/image FILE shows it an image)"
    assert rows["stage 2"] == f"--pretrain_mm_mlp_adapter {directory}/mm_projector.bin"
    assert rows["plots"] == f"{directory}/loss.png"
    assert rows["report"] == f"{directory}/report.html"
    assert Path(rows["report"]).read_text(encoding="utf-8").count("<svg") == 6
    assert Path(rows["plots"]).is_file()
    assert float(rows["memory"].split()[0]) > 0.1
    assert rows["time"].removesuffix("s").endswith(("second", "minute"))


@pytest.fixture
def started(stage_flags, tmp_path, caplog, monkeypatch):
    """Return a function that starts a run in the same directory; it returns the messages and whether it trained."""

    def start(*flags):
        caplog.clear()
        before = (
            (tmp_path / "out/metrics.jsonl").stat().st_mtime_ns if (tmp_path / "out/metrics.jsonl").exists() else 0
        )
        with caplog.at_level(logging.INFO):
            main(stage_flags("projector", tmp_path / "out", *flags))
        return caplog.text, (tmp_path / "out/metrics.jsonl").stat().st_mtime_ns != before

    return start


def test_a_finished_run_that_is_started_again_says_so_and_how_to_train_on(started, tmp_path):
    assert started(*EPOCH)[1]
    model = (tmp_path / "out/trained.safetensors").stat().st_mtime_ns
    output, trained = started(*EPOCH)
    assert not trained
    assert (tmp_path / "out/trained.safetensors").stat().st_mtime_ns == model
    assert f"{tmp_path}/out holds a finished run (6 steps, 1 epoch, loss " in output
    assert "to train on:     --num_train_epochs 2, for example" in output
    assert "or --resume_from_checkpoint False, which replaces the model" in output
    # As it says.
    output, trained = started(*EPOCH, "--num_train_epochs", "2")
    assert trained
    assert "resuming from" in output
    assert "finished: 12 steps, 2 epochs" in output
    output, trained = started(*EPOCH, "--resume_from_checkpoint", "False")
    assert trained
    assert "holds a finished run; its model is replaced when this run has ended" in output


def test_a_finished_run_without_a_checkpoint_is_left_alone_too(started, tmp_path):
    started("--max_steps", "2")
    output, trained = started("--max_steps", "2")
    assert not trained
    assert f"to train on:     --model_name_or_path {tmp_path}/out and another --output_dir" in output
    assert not started("--max_steps", "1")[1]
    # More than it did: there is nothing to resume from, and it starts again.
    assert started("--max_steps", "3")[1]


def test_a_run_of_other_steps_is_not_taken_for_the_finished_one(started, capsys):
    started(*EPOCH)
    with pytest.raises(SystemExit):
        started(*EPOCH, "--seed", "7")
    assert "cannot be resumed exactly: seed was 42, is 7" in capsys.readouterr().err


def test_another_rate_for_a_finished_run_is_reported_to_have_no_effect(started):
    started(*EPOCH)
    output, trained = started(*EPOCH, "--learning_rate", "7e-5")
    assert not trained
    assert "nothing was trained.\n  without effect:  learning_rate was" in output
    assert "is 7e-05" in output


def test_a_run_does_not_resume_with_other_images_template_or_new_tokens(started, capsys):
    started(*EPOCH)
    for flag, value, words in (
        ("--image_aspect_ratio", "pad", "image_aspect_ratio was square, is pad"),
        ("--version", "llava_llama_2", "is llava_llama_2"),
        ("--new_tokens", "<z>", "vocab_size was "),
    ):
        with pytest.raises(SystemExit):
            started(*EPOCH, "--num_train_epochs", "2", flag, value)
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["config.json", "trainer_state.json"])
def test_a_run_that_did_not_end_is_not_taken_for_finished(missing, started, tmp_path):
    started(*EPOCH)
    (tmp_path / "out" / missing).unlink()
    output, _ = started(*EPOCH)
    assert "holds a finished run" not in output
    assert (tmp_path / "out" / missing).is_file()


def arguments(directory, **changes):
    defaults = {"max_steps": -1, "num_train_epochs": 1.0, "resume_from_checkpoint": None, "should_save": True}
    defaults["push_to_hub"] = False
    return SimpleNamespace(output_dir=str(directory), **(defaults | changes))


@pytest.mark.parametrize(
    ("state", "changes", "is_finished"),
    [
        ({}, {}, True),
        ({}, {"num_train_epochs": 2.0}, False),
        ({}, {"num_train_epochs": 0.5}, True),
        ({}, {"max_steps": 30}, True),
        ({}, {"max_steps": 31}, False),
        ({}, {"resume_from_checkpoint": "True"}, True),
        ({}, {"resume_from_checkpoint": "False"}, False),
        ({}, {"resume_from_checkpoint": "out/checkpoint-3"}, False),
        # Packs of tokens may end an epoch a little early.
        ({"epoch": 0.99}, {}, True),
        ({"epoch": 0.9}, {}, False),
        # A step may be all there is.
        ({"global_step": 1, "max_steps": 1}, {"num_train_epochs": 1.6}, False),
        ({"global_step": 20}, {}, False),
        ({"global_step": 0, "epoch": None}, {}, False),
    ],
)
def test_a_run_is_finished_if_it_did_all_that_is_asked_for(state, changes, is_finished, tmp_path):
    full = {"global_step": 30, "max_steps": 30, "epoch": 1.0, "log_history": []} | state
    (tmp_path / "trainer_state.json").write_text(json.dumps(full))
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert (finished_before(arguments(tmp_path, **changes)) is not None) == is_finished


def test_a_state_that_cannot_be_read_is_no_finished_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "trainer_state.json").write_text('{"global_st')
    assert finished_before(arguments(tmp_path)) is None


def test_chat_command_is_one_that_can_be_typed(monkeypatch):
    monkeypatch.setattr(ending.shutil, "which", lambda name: None)
    monkeypatch.setattr(ending.sys, "executable", "/opt/my python/bin/python")
    assert chat_command("out/a b") == "'/opt/my python/bin/python' -m llava_lite.cli chat 'out/a b'"


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ([], "2.5000 on average; no step was logged (--logging_steps)"),
        ([{"loss": 3.0}, {"loss": 1.0}, {"eval_loss": 9.0}], "1.0000 at the end, 3.0000 at the start"),
        # With experts "loss" is the sum with their balance loss.
        ([{"loss": 3.5, "lm_loss": 3.0}, {"loss": 1.5, "lm_loss": 1.0}], "1.0000 at the end, 3.0000 at the start"),
        ([{"loss": 2e-5}, {"loss": 1e30}, {"loss": float("inf")}], "1e+30 at the end, 2e-05 at the start"),
        ([{"loss": "nan"}, {"loss": 1.0}], "1.0000 at the end, 1.0000 at the start"),
        (
            [{"loss": float(i)} for i in range(20)],
            "18.5000 at the end, 0.5000 at the start (means of the last and first 2 logs)",
        ),
    ],
)
def test_losses_are_those_of_the_first_and_the_last_tenth(log, line):
    assert loss_line(log, 2.5) == line


def test_evaluation_names_the_best_where_the_last_is_not(tmp_path):
    log = [{"eval_loss": 0.5, "step": 100}, {"eval_loss": 0.75, "step": 2000}]
    assert evaluation_line(log) == "loss 0.7500, best 0.5000 at step 100"
    assert evaluation_line(log[:1]) == "loss 0.5000"
    assert evaluation_line([]) == ""
