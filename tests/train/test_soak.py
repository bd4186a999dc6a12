"""A run that is killed, stopped, signalled and out of disk ends bit-equal to the one that was never touched."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.train import soak

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# The long run: LLAVA_LITE_SOAK_STEPS=2000 LLAVA_LITE_SOAK_FAULTS=50, and a directory that keeps its files.
STEPS = int(os.environ.get("LLAVA_LITE_SOAK_STEPS", "80"))
FAULTS = int(os.environ.get("LLAVA_LITE_SOAK_FAULTS", "8"))
MORE = (
    "--mm_projector_type mlp2x_gelu --save_strategy steps --save_steps 10 --save_total_limit 3 --logging_steps 1 "
    "--dataloader_num_workers 2 --ddp_timeout 15 --group_by_modality_length True --report_to none "
    "--eval_strategy steps --eval_steps 16 --num_eval_generations 1 --eval_max_new_tokens 4 "
    "--lr_scheduler_type cosine --warmup_steps 5"
)
KEPT = os.environ.get("LLAVA_LITE_SOAK_DIR")


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_under_faults_ends_as_the_one_never_touched(num_ranks, stage_flags, toy_llm_dir, toy_data, tmp_path):
    llm = shutil.copytree(toy_llm_dir("llama"), tmp_path / "llm")
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    # An epoch is longer than what workers read ahead: one that is stopped is missed.
    data, (eval_data, _) = toy_data(tmp_path / "data", num_records=240), toy_data(tmp_path / "eval")
    flags = stage_flags("moe", tmp_path / "unused", *MORE.split(), "--max_steps", STEPS, data=data, model=llm)
    at = flags.index("--output_dir")
    flags = [*flags[:at], *flags[at + 2 :], "--eval_data_path", eval_data]
    flags += ["--deepspeed", str(ROOT / "zero2.json")] if num_ranks > 1 else []
    directory = Path(KEPT or tmp_path) / f"soak_{num_ranks}"
    command = [sys.executable, str(HERE / "soak.py"), str(directory)]
    command += ["--faults", str(FAULTS), "--ranks", str(num_ranks), "--", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    result = json.loads((directory / "result.json").read_text())
    assert result["equal"] == {"files": True, "log": True}
    assert sum(result["faults"].values()) >= FAULTS // 2


def run_of(checkpoints, final="f", log=((1, 2.5), (2, 2.25))):
    """Return the facts of a run; checkpoints: {step: hash of its weights}."""
    files = {f"checkpoint-{step}": {f"checkpoint-{step}/w.safetensors": value} for step, value in checkpoints.items()}
    return {
        "files": files | {".": {"w.safetensors": final}},
        "log": [{"step": step, "loss": loss} for step, loss in log],
    }


@pytest.mark.parametrize(
    ("expected", "found", "limit", "files"),
    [
        # Signals write checkpoints of their own.
        (run_of({10: "a", 20: "b"}), run_of({10: "a", 19: "s", 20: "b"}), None, []),
        (run_of({10: "a", 20: "b"}), run_of({19: "s", 20: "b"}), None, ["checkpoint-10 is missing"]),
        (run_of({10: "a", 20: "b"}), run_of({19: "s", 20: "b"}), 2, []),
        (run_of({10: "a", 20: "b"}), run_of({10: "a", 19: "s"}), 2, ["checkpoint-20 is missing"]),
        (run_of({10: "a"}), run_of({10: "x"}), None, ["checkpoint-10/w.safetensors differs"]),
        (run_of({}), run_of({}, final="x"), None, ["w.safetensors differs"]),
    ],
)
def test_the_checkpoints_of_signals_are_no_difference_and_others_are(expected, found, limit, files):
    assert soak.find_differences(expected, found, limit) == {"files": files, "log": []}


def test_a_number_of_the_log_that_differs_is_shown():
    found = run_of({}, log=((1, 2.5), (2, 2.0), (3, 1.0)))["log"]
    assert soak.find_differences(run_of({}), run_of({}) | {"log": found})["log"] == [
        "line 2 is {'step': 2, 'loss': 2.0}; in the untouched run {'step': 2, 'loss': 2.25}",
        "3 lines; in the untouched run 2",
    ]


def test_the_weights_of_a_run_belong_to_its_checkpoint_or_to_its_final_directory(tmp_path):
    for name in ("checkpoint-10/w.safetensors", "experts/w.safetensors", "w.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = soak.facts(tmp_path)["files"]
    assert {owner: list(files) for owner, files in found.items()} == {
        "checkpoint-10": ["checkpoint-10/w.safetensors"],
        ".": ["experts/w.safetensors", "w.safetensors"],
    }


@pytest.mark.parametrize("flags", [["--save_total_limit", "3"], ["--save-total-limit=3"], ["run.yaml"]])
def test_flags_are_read_in_all_spellings(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("save_total_limit: 3\n")
    assert soak.get_limit(soak.read_flags(flags)) == 3
    assert soak.get_limit(soak.read_flags([*flags, "--metric_for_best_model", "loss"])) == 2
    assert soak.get_limit(soak.read_flags(["--max_steps=4"])) is None


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--max_steps", "4"], "exists: name a directory that does not, or remove it"),
        (["--output_dir=here"], "leave out --output_dir here"),
        (["gone.yaml"], "the flags of the run: there is no YAML file 'gone.yaml'"),
        (["--save_total_limit", "few"], "the flags of the run: --save_total_limit needs a whole number; got 'few'"),
    ],
)
def test_what_cannot_be_is_said_before_any_run(words, found, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        soak.main([str(tmp_path), "--", *words])
    assert found in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


WAITS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import soak
with soak.cleaning_up():
    soak.soak(Path(sys.argv[2]), sys.argv[3:], 1, 1, 0, 10)
"""


@pytest.mark.parametrize("number", list(soak.SIGNALS.values()))
def test_a_signal_to_the_soak_leaves_no_run_and_no_mount(number, stage_flags, tmp_path):
    directory = tmp_path / "soak"
    directory.mkdir()
    command = [sys.executable, "-c", WAITS, str(HERE), str(directory), *map(str, stage_flags("full", "unused"))]
    # As a terminal starts it, whatever the tests ignore.
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear) as process:
        deadline = time.monotonic() + 120
        while not (runs := get_runs(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert runs
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + number, said
    assert f"ended by {number.name}; no run and no mount is left" in said
    assert get_runs(process.pid) == []
    assert not os.path.ismount(directory / "disk")


def hear():
    for number in soak.SIGNALS.values():
        signal.signal(number, signal.SIG_DFL)


def get_runs(pid):
    """Return the processes of the runs of a soak."""
    found = []
    for process in psutil.process_iter():
        try:
            found += [process] if process.environ().get(soak.MARK) == str(pid) else []
        except (psutil.Error, OSError):
            continue
    return found
