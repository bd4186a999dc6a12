"""run.json says what a run is, and how it began and ended, however it ends."""

import json
import os
import signal

import pytest
import torch
from transformers.trainer_callback import TrainerCallback

from llava_lite.train.monitor.finite import NonFiniteError
from llava_lite.train.monitor.report.record import get_command
from llava_lite.train.train import prepare, run

SAVING = ["--save_strategy", "steps", "--save_steps", "1"]


class AtStep(TrainerCallback):
    """Do something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        """Do it."""
        if state.global_step == self.step:
            self.action()


def read(directory):
    return json.loads((directory / "run.json").read_text(encoding="utf-8"))


@pytest.fixture
def start(stage_flags, tmp_path):
    """Return a function: stage, flags, callbacks -> runs it in tmp_path/out, returns the trainer."""

    def begin(kind, *flags, callbacks=(), **kwargs):
        argv = stage_flags(kind, tmp_path / "out", *flags, **kwargs)
        stage = prepare(argv)
        for callback in callbacks:
            stage.trainer.add_callback(callback)
        return run(stage, argv)

    return begin


def test_a_finished_run_has_its_facts_and_its_page(start, tmp_path, toy_data):
    evaluates = ["--eval_split", 4, "--eval_strategy", "epoch", "--num_eval_generations", 2]
    trainer = start("moe", *evaluates, data=toy_data(tmp_path / "mixed"))
    out, record = tmp_path / "out", read(tmp_path / "out")
    (begun,) = record["starts"]
    assert begun["step"] == 0
    assert begun["command"].startswith("llava-lite train --model_name_or_path /")
    assert begun["command"].endswith("--eval_split 4 --eval_strategy epoch --num_eval_generations 2")
    # The run chose how to pack; nobody gave a flag for it.
    assert {"learning_rate", "eval_split"} <= set(record["given"]) <= record["settings"].keys()
    assert "packing" in record["settings"].keys() - set(record["given"])
    threads = torch.get_num_threads()
    assert begun["device"] == f"CPU, {threads} thread{'s' * (threads != 1)} a rank"
    assert record["end"]["state"] == "finished"
    assert record["end"]["memory_gib"] > 0.1
    assert (record["tuning"], record["max_steps"], record["records_a_step"]) == ("moe", 5, 4)
    assert record["experts"] == {"0": {"num": 4, "top_k": 2}, "2": {"num": 4, "top_k": 2}}
    # 24 records of which 4 are held out.
    data = record["data"]["train"]
    lengths = [len(trainer.train_dataset[i]["input_ids"]) for i in range(20)]
    assert (data["records"], record["data"]["eval"]["records"]) == (20, 4)
    assert (data["tokens"], data["lengths"]["longest"]) == (sum(lengths), max(lengths))
    assert (sum(data["histogram"]["counts"]), data["histogram"]["edges"][0]) == (20, min(lengths))
    assert data["histogram"]["edges"][-1] > max(lengths)
    model = trainer.model
    total = sum(row["trained"] for row in record["parameters"].values())
    assert total == sum(p.numel() for p in model.parameters() if p.requires_grad)
    shown = [example["id"] for example in trainer.eval_examples if "images" in example]
    assert shown
    assert list(record["images"]) == shown
    assert all((out / "samples" / name).is_file() for names in record["images"].values() for name in names)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == len(shown)
    assert "at step 5" in page


def test_a_stopped_run_that_is_resumed_keeps_both_starts(start, tmp_path, caplog):
    out = tmp_path / "out"
    # A signal is seen at the end of the step after it.
    with pytest.raises(SystemExit):
        start("projector", *SAVING, callbacks=[AtStep(2, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    assert read(out)["end"]["state"] == "stopped"
    assert "stopped after step 3; the same command resumes it from checkpoint-3" in (out / "report.html").read_text()
    start("projector", *SAVING)
    record = read(out)
    assert [begun["step"] for begun in record["starts"]] == [0, 3]
    assert record["starts"][0]["end"]["state"] == "stopped"
    assert record["end"]["state"] == "finished"
    assert "The run was resumed, from step 3." in (out / "report.html").read_text()
    (out / "run.json").write_text("{bad")
    start("projector", *SAVING, "--num_train_epochs", "2")
    assert len(read(out)["starts"]) == 1
    (lost,) = [one.getMessage() for one in caplog.records if "are lost to its report" in one.getMessage()]
    assert lost.startswith("run.json is damaged (no JSON: ")
    # One that starts again from the beginning is another run.
    start("projector", *SAVING, "--resume_from_checkpoint", "False")
    assert len(read(out)["starts"]) == 1


def test_a_run_that_fails_says_why(stage_flags, tmp_path):
    out, flags = tmp_path / "out", stage_flags("projector", tmp_path / "out")
    stage = prepare(flags)
    stage.trainer.model.get_output_embeddings().register_forward_hook(lambda head, args, loss: loss * torch.nan)
    with pytest.raises(NonFiniteError):
        run(stage)
    assert read(out)["end"]["state"] == "failed"
    assert "NonFiniteError: step 1: rank 0: loss nan" in read(out)["end"]["reason"]
    assert "The run ended with an error after step 0: NonFiniteError" in (out / "report.html").read_text()


def test_a_report_that_fails_is_one_line_and_does_not_fail_the_run(start, tmp_path, caplog):
    (tmp_path / "out/report.html").mkdir(parents=True)
    start("projector", "--max_steps", 1)
    assert (tmp_path / "out/config.json").is_file()
    lines = [record.getMessage() for record in caplog.records if " has no report" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith(
        f"{tmp_path}/out has no report (IsADirectoryError: '{tmp_path}/out/report.html' is a dir"
    )
    assert read(tmp_path / "out")["end"]["state"] == "finished"


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["--a", "x y", "--local_rank=0"], "llava-lite train --a 'x y'"),
        (["--hub_token", "hf_secret", "--b", "1"], "llava-lite train --hub_token ... --b 1"),
        (["--hub-token=hf_secret"], "llava-lite train --hub-token=..."),
        (["run.yaml", "--new_tokens", "<a>"], "llava-lite train run.yaml --new_tokens '<a>'"),
    ],
)
def test_a_command_is_kept_without_its_secrets(argv, command):
    assert get_command(argv) == command
