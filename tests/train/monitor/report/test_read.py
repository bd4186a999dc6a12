"""A run is read from whatever its directory holds, and what is no run is answered in one sentence."""

import json

import pytest

from llava_lite.train.monitor.report.read import read_run

LOG = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
STATE = {"global_step": 2, "max_steps": 2, "log_history": LOG}


def test_a_run_in_progress_is_open(run_dir):
    run = read_run(run_dir(LOG, run={"starts": [{"ranks": 2}], "max_steps": 10}))
    assert (run.status, run.step, run.max_steps, run.ranks) == ("open", 2, 10, 2)
    assert run.series("loss") == ([1, 2], [3.0, 2.0])


def test_an_old_run_is_finished_by_the_state_of_its_last_step(run_dir):
    run = read_run(run_dir(LOG, trainer_state=STATE))
    assert (run.status, run.record, run.tuning, run.ranks) == ("finished", {}, None, None)
    assert read_run(run_dir(LOG, "stopped", trainer_state=STATE | {"max_steps": 3})).status == "open"


def test_a_log_may_be_that_of_the_trainer_with_values_that_are_not_finite(run_dir):
    log = [*LOG, {"step": 3, "loss": float("nan")}, {"no": "step"}, "x"]
    run = read_run(run_dir(trainer_state=STATE | {"log_history": log}))
    assert run.lines == [*LOG, {"step": 3, "loss": "nan"}]


def test_a_line_that_is_being_written_is_left_out(run_dir):
    directory = run_dir(LOG)
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert read_run(directory).step == 2


def test_a_stopped_run_of_an_earlier_version_has_the_flags_and_the_state_of_its_checkpoint(run_dir):
    directory = run_dir(LOG)
    (directory / "checkpoint-2").mkdir()
    steps = {"seed": 7, "world_size": 1, "trained parameters": ["a", "b"]}
    files = {"trainer_state.json": {"size": 1, "sha256": "0" * 64}}
    manifest = {"files": files, "serial": 0, "step": 2, "world_size": 1, "steps": steps}
    manifest |= {"schedule": {"learning_rate": 1e-3}}
    (directory / "checkpoint-2/manifest.json").write_text(json.dumps(manifest))
    (directory / "checkpoint-2/trainer_state.json").write_text(json.dumps({"global_step": 2, "max_steps": 9}))
    run = read_run(directory)
    assert run.settings == {"seed": 7, "world_size": 1, "learning_rate": 1e-3}
    assert (run.max_steps, run.status) == (9, "open")


def test_with_experts_the_loss_is_the_cross_entropy(run_dir):
    assert read_run(run_dir([{"step": 1, "loss": 3.0, "lm_loss": 2.9}])).loss_key == "lm_loss"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone", r"gone' does not exist; name the --output_dir of a run of `llava-lite train`\."),
        ("file", r"file' is a file; name the --output_dir"),
        (
            "empty",
            r"empty' holds no run: no metrics.jsonl, run.json, trainer_state.json or checkpoint-N. Name the --out",
        ),
        (".", r"holds no run: .* Runs below it: my run\."),
    ],
)
def test_what_is_no_run_is_named(name, words, run_dir, tmp_path):
    run_dir(LOG)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        read_run(tmp_path / name)


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"data": []}, "is damaged ('data' is a list, expected an object)"),
        ({"starts": {}}, "is damaged ('starts' is an object, expected a list)"),
        ({"starts": ["x"]}, "is damaged ('starts' holds what is no object)"),
        ({"end": None}, "is damaged ('end' is empty, expected an object)"),
    ],
)
def test_fields_of_another_kind_are_left_out_and_named(record, fault, run_dir):
    run = read_run(run_dir(LOG, run=record | {"max_steps": 7}))
    assert run.files.faults["run.json"] == fault
    assert run.record == {"max_steps": 7}


def test_lines_without_a_step_that_is_one_are_counted(run_dir):
    log = [{"loss": 1.0}, *({"step": step, "loss": 1.0} for step in ("x", None, True, -1, 2**80, 1.5, float("nan")))]
    run = read_run(run_dir([*LOG, *log]))
    assert run.lines == LOG
    assert run.files.sentence("metrics.jsonl") == (
        "metrics.jsonl is damaged (8 of its lines have no step and are left out)."
    )
