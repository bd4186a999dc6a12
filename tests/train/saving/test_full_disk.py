"""A disk that is full, wherever a run writes: one sentence with directory and bytes, and nothing earlier is lost.

/dev/full refuses every write with ENOSPC, a limit on the size of files with EFBIG: both at the system call, and no
rights are needed. A small file system of its own is mounted where the tests may do that.
"""

import json
import os
import resource
import runpy
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from llava_lite.errors import DiskError, named_disk_errors
from llava_lite.train.inputs import feature_fill
from llava_lite.train.llava_trainer import LLaVATrainer
from llava_lite.train.saving import final
from llava_lite.train.saving.manifest import SaveError, newest_complete_checkpoint
from llava_lite.train.train import main, prepare, train

FLAGS = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "1"]
FLAGS += ["--report_to", "none"]


@contextmanager
def files_of_at_most(num_bytes):
    """Let every write beyond so many bytes of a file fail, as one on a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fails_from(monkeypatch, owner, name, num_bytes=2000, step=0):
    """Let writes fail inside a function of the run, from a step on."""
    inner = getattr(owner, name)

    def on_a_full_disk(*args, **kwargs):
        if step and args[0].state.global_step < step:
            return inner(*args, **kwargs)
        with files_of_at_most(num_bytes):
            return inner(*args, **kwargs)

    monkeypatch.setattr(owner, name, on_a_full_disk)


def losses(directory):
    lines = map(json.loads, (Path(directory) / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def assert_resumes(flags, out, expected):
    """Start the same command again, with room, and compare it with the run that always had some."""
    train(flags)
    assert losses(out) == expected
    assert newest_complete_checkpoint(out) == str(out / "checkpoint-4")
    assert not list(out.glob("tmp-*"))


@pytest.fixture
def expected(stage_flags, tmp_path):
    """The losses of the run without a fault."""
    train(stage_flags("projector", tmp_path / "expected", *FLAGS))
    return losses(tmp_path / "expected")


# The run saves at steps 2 and 4, after their lines; the last line of all comes after the last step.
@pytest.mark.parametrize(
    ("step", "lost", "stopped_at", "kept"),
    [(2, "loss", 2, None), (3, "loss", 4, 2), (4, "loss", 4, 2), (4, "train_loss", 4, 4)],
)
def test_a_log_that_cannot_be_written_ends_the_run_and_it_resumes(
    stage_flags, tmp_path, monkeypatch, expected, step, lost, stopped_at, kept
):
    out = tmp_path / "out"
    flags = stage_flags("projector", out, *FLAGS)
    log = LLaVATrainer.log

    def log_on_a_full_disk(trainer, logs, *args):
        if trainer.state.global_step == step and lost in logs:
            (out / "metrics.jsonl").rename(out / "kept")
            (out / "metrics.jsonl").symlink_to("/dev/full")
        log(trainer, logs, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LLaVATrainer, "log", log_on_a_full_disk)
        with pytest.raises(DiskError) as error:
            train(flags)
    text = str(error.value)
    assert text.startswith(f"{out / 'metrics.jsonl'} cannot be written: No space left on device; ")
    assert "bytes are needed, " in text
    assert "bytes are free in " in text
    assert text.endswith(f"The run stopped at step {stopped_at}.")
    assert newest_complete_checkpoint(out) == (None if kept is None else str(out / f"checkpoint-{kept}"))
    (out / "metrics.jsonl").unlink()
    (out / "kept").rename(out / "metrics.jsonl")
    assert_resumes(flags, out, expected)
    assert '"train_loss"' in (out / "metrics.jsonl").read_text().splitlines()[-1]


def test_a_log_that_cannot_be_begun_ends_the_run_before_its_first_step(stage_flags, tmp_path):
    out = tmp_path / "out"
    (out / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(DiskError, match=r"metrics\.jsonl cannot be written: Is a directory; .* stopped at step 0"):
        train(stage_flags("projector", out, *FLAGS))


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(stage_flags, tmp_path, monkeypatch, expected):
    out = tmp_path / "out"
    flags = stage_flags("projector", out, *FLAGS)
    with monkeypatch.context() as patch:
        fails_from(patch, LLaVATrainer, "_save_checkpoint", step=4)
        with pytest.raises(SaveError, match=r"tmp-checkpoint-4: about [\d,]+ bytes are needed, [\d,]+ bytes are free"):
            train(flags)
    assert [path.name for path in out.glob("*checkpoint-*")] == ["checkpoint-2"]
    assert_resumes(flags, out, expected)


@pytest.mark.parametrize(
    ("function", "num_bytes"), [("write_directory", 300), ("write_directory", 5000), ("write_state", 300)]
)
def test_a_final_directory_that_does_not_fit_leaves_every_checkpoint(
    stage_flags, tmp_path, monkeypatch, expected, function, num_bytes
):
    out = tmp_path / "out"
    flags = stage_flags("projector", out, *FLAGS)
    with monkeypatch.context() as patch:
        fails_from(patch, final, function, num_bytes)
        with pytest.raises(SaveError, match=rf"Could not write .*{out}.*[\d,]+ bytes are free in {out}"):
            train(flags)
    assert newest_complete_checkpoint(out) == str(out / "checkpoint-4")
    assert (out / "config.json").exists() == (function == "write_state")
    assert not (out / "trainer_state.json").exists()
    assert_resumes(flags, out, expected)
    assert (out / "config.json").exists()
    assert (out / "trainer_state.json").exists()


def test_a_prolonged_run_whose_model_does_not_fit_is_not_taken_for_a_finished_one(stage_flags, tmp_path, monkeypatch):
    flags = stage_flags("projector", tmp_path / "out", *FLAGS)
    train(flags)
    with monkeypatch.context() as patch:
        fails_from(patch, final, "write_directory", 300)
        with pytest.raises(SaveError):
            train([*flags, "--max_steps", "6"])
    written = (tmp_path / "out" / "mm_projector.bin").stat().st_mtime_ns
    main([*flags, "--max_steps", "6"])
    assert (tmp_path / "out" / "mm_projector.bin").stat().st_mtime_ns > written


def test_what_only_decorates_a_run_is_left_out_with_a_warning(
    stage_flags, tmp_path, monkeypatch, caplog, plots, expected
):
    from llava_lite.train.monitor import plots as drawn
    from llava_lite.train.monitor.report import record

    out = tmp_path / "out"
    fails_from(monkeypatch, drawn, "save_figure", 100)
    fails_from(monkeypatch, record.RunRecord, "write", 100)
    fails_from(monkeypatch, record.RunRecord, "report", 100)
    out.mkdir()
    (out / "generations.jsonl").symlink_to("/dev/full")
    more = ["--eval_split", "3", "--eval_strategy", "steps", "--eval_steps", "2", "--num_eval_generations", "1"]
    train(stage_flags("projector", out, *FLAGS, *more, "--eval_max_new_tokens", "2"))
    for words in (
        "has no new plots",
        "run.json is not written",
        "has no report",
        "answers of step 2 are not in gener",
    ):
        assert words in caplog.text
    assert (out / "config.json").exists()
    assert [path.name for path in out.rglob("*.part")] == []


@pytest.mark.parametrize("where", ["index", "features"])
def test_a_cache_that_cannot_be_written_is_named_with_the_bytes(stage_flags, tmp_path, monkeypatch, where):
    flags = stage_flags("projector", tmp_path / "out", *FLAGS, "--feature_cache", tmp_path / "store")
    if where == "features":
        fails_from(monkeypatch, feature_fill, "write_features", 5000)
        with pytest.raises(ValueError, match=rf"{tmp_path / 'store'}.* cannot be written: File too large") as error:
            prepare(flags)
        assert "bytes are needed, " in str(error.value)
        assert not list((tmp_path / "store").rglob("*.bin"))
    else:
        words = r"spans\.npy cannot be written: File too large; .* bytes are needed, .*LLAVA_LITE_CACHE for indexes"
        with files_of_at_most(100), pytest.raises(DiskError, match=words):
            prepare(flags)
    monkeypatch.undo()
    monkeypatch.setenv("LLAVA_LITE_CACHE", str(tmp_path / "cache"))
    prepare(flags)


def test_a_program_ends_with_one_sentence_and_status_1(stage_flags, tmp_path):
    out = tmp_path / "out"
    (out / "metrics.jsonl").mkdir(parents=True)
    command = [sys.executable, "-m", "llava_lite.train.train", *stage_flags("projector", out, *FLAGS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith(f"llava-lite train: {out / 'metrics.jsonl'} cannot be written: Is a directory; ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [28, 122, 30, 27, 13])
def test_each_reason_of_a_disk_is_said_and_keeps_its_number(tmp_path, number):
    with pytest.raises(DiskError, match=os.strerror(number)) as error, named_disk_errors(tmp_path / "a", "Mend it."):
        raise OSError(number, os.strerror(number))
    assert error.value.errno == number
    assert str(error.value).endswith(f"bytes are free in {tmp_path}. Mend it.")


@pytest.fixture
def small_disk(tmp_path):
    """Return a function: bytes -> a directory on a file system of that size; skips where none can be mounted."""
    mounted = []

    def mount(num_bytes):
        directory = tmp_path / "small"
        directory.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(directory)]
        done = subprocess.run(command, capture_output=True, check=False) if os.geteuid() == 0 else None
        if done is None or done.returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(directory)
        return directory

    yield mount
    for directory in mounted:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_run_on_a_disk_that_fills_up_resumes_when_there_is_room(stage_flags, small_disk, expected):
    disk = small_disk(4_000_000)
    flags = stage_flags("projector", disk / "out", *FLAGS)
    (disk / "filler").write_bytes(b"\0" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 40_000))
    with pytest.raises((SaveError, DiskError), match=r"bytes are free|bytes are needed"):
        train(flags)
    (disk / "filler").unlink()
    assert_resumes(flags, disk / "out", expected)


@pytest.mark.slow
def test_two_ranks_end_together_when_one_cannot_write_its_log(stage_flags, tmp_path):
    launch = runpy.run_path(str(Path(__file__).parents[1] / "test_ranks.py"))["launch"]
    (tmp_path / "out" / "metrics.jsonl").mkdir(parents=True)
    found = launch([{"name": "case", "argv": stage_flags("projector", tmp_path / "out", *FLAGS)}], tmp_path)
    errors = [result["error"] for result in found["case"]]
    assert errors[0] == errors[1]
    assert "metrics.jsonl cannot be written: Is a directory; " in errors[0]
