"""One run at a time trains in an output directory; a lock that its owner left behind is told from a live one."""

import contextlib
import json
import logging
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_lite.train.saving import lock as locks
from llava_lite.train.saving.lock import LOCK, OutputInUse, OutputLock, hold_output, output_held, release_output

HERE = Path(__file__).parents[1]
ROOT = HERE.parents[1]
# Another process that takes the lock of a directory, says so, and waits; machine: what it takes itself to run on.
OWNER = """
import sys, time
from llava_lite.train.saving import lock
directory, machine, has_kernel_lock = sys.argv[1:]
if machine != "this":
    lock.get_machine = lambda file: [machine, 0]
if has_kernel_lock == "no":
    lock.lock_file = lambda file: None
owner = lock.OutputLock(directory, "first", beat_s=0.2, watch_s=2)
owner.acquire()
print("taken", flush=True)
time.sleep(600)
"""


@pytest.fixture
def start_owner():
    """Return a function that starts the owner of a directory and returns its process."""
    owners = []

    def start(directory, machine="this", kernel="yes"):
        command = [sys.executable, "-c", OWNER, str(directory), machine, kernel]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        owners.append(owner)
        assert owner.stdout.readline() == "taken\n"
        return owner

    yield start
    for owner in owners:
        owner.kill()
        owner.wait()


def args_of(directory, should_save=True):
    return SimpleNamespace(output_dir=str(directory), should_save=should_save)


def second(directory):
    """Return another run's lock that waits as short as the owner's numbers allow."""
    return OutputLock(directory, "second", beat_s=0.2, watch_s=5)


def test_a_second_run_is_refused_with_host_process_time_and_what_to_do(start_owner, tmp_path):
    owner = start_owner(tmp_path)
    since = json.loads((tmp_path / LOCK).read_text())["since"]
    with pytest.raises(OutputInUse) as error:
        hold_output(args_of(tmp_path))
    host = os.uname().nodename
    assert str(error.value) == (
        f"--output_dir '{tmp_path}' is in use by another run (host {host}, process {owner.pid}, since {since}). Wait "
        "until it has ended or end it, or give another --output_dir."
    )
    assert os.listdir(tmp_path) == [LOCK]


def test_the_lock_of_a_process_that_was_killed_is_taken_at_once(start_owner, tmp_path, monkeypatch):
    owner = start_owner(tmp_path)
    owner.kill()
    owner.wait()
    assert (tmp_path / LOCK).exists()
    monkeypatch.setattr(OutputLock, "_is_alive", lambda lock, owner: pytest.fail("waits for a process that is dead"))
    with output_held(args_of(tmp_path)):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_a_process_that_was_forked_does_not_keep_the_lock_of_its_dead_owner(tmp_path):
    code = (
        "import os, time; from types import SimpleNamespace; from llava_lite.train.saving import lock\n"
        f"lock.hold_output(SimpleNamespace(output_dir={str(tmp_path)!r}, should_save=True))\n"
        "child = os.fork()\n"
        "if child == 0: time.sleep(600)\n"
        "print(child, flush=True); time.sleep(600)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    orphan = int(owner.stdout.readline())
    try:
        with pytest.raises(OutputInUse):
            hold_output(args_of(tmp_path))
        owner.kill()
        owner.wait()
        # The child has closed its copy of the file as soon as it runs.
        deadline = time.monotonic() + 60
        while locks.lock_file(os.open(tmp_path / LOCK, os.O_RDWR)) is not True:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        owner.kill()
        os.kill(orphan, signal.SIGKILL)


@pytest.mark.parametrize("kernel", [True, None])
def test_a_run_on_another_machine_is_alive_as_long_as_it_writes_new_numbers(
    start_owner, tmp_path, monkeypatch, caplog, kernel
):
    # A file system that does not pass locks on to other machines, or has none.
    owner = start_owner(tmp_path, machine="far", kernel="no")
    monkeypatch.setattr(locks, "lock_file", lambda file: kernel)
    with caplog.at_level(logging.INFO), pytest.raises(OutputInUse, match=rf"in use by another run \(.*{owner.pid}"):
        second(tmp_path).acquire()
    assert "waiting up to 5 s to see whether it is alive" in caplog.text
    owner.kill()
    owner.wait()
    taken = second(tmp_path)
    taken.acquire()
    assert json.loads((tmp_path / LOCK).read_text())["run"] == "second"
    taken.release()


def test_the_lock_of_a_dead_machine_that_the_server_still_keeps_is_replaced(start_owner, tmp_path):
    owner = start_owner(tmp_path, machine="far")
    with pytest.raises(OutputInUse):
        second(tmp_path).acquire()
    # Stopped, it holds the kernel's lock and writes no number.
    owner.send_signal(signal.SIGSTOP)
    taken = second(tmp_path)
    taken.acquire()
    assert json.loads((tmp_path / LOCK).read_text())["run"] == "second"
    taken.release()


def test_an_owner_that_lost_its_file_says_so(tmp_path, caplog):
    lock = OutputLock(tmp_path, "first", beat_s=0.05)
    lock.acquire()
    (tmp_path / LOCK).unlink()
    deadline = time.monotonic() + 30
    while "is gone: another run may write" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lock.release()


def test_nodes_of_one_run_that_share_a_disk_do_not_refuse_each_other(tmp_path):
    first, other_node = OutputLock(tmp_path, "same"), OutputLock(tmp_path, "same")
    first.acquire()
    other_node.acquire()
    assert other_node.file is None
    other_node.release()
    assert os.listdir(tmp_path) == [LOCK]
    first.release()


def test_a_process_may_hold_it_twice_and_the_outermost_gives_it_back(tmp_path):
    args = args_of(tmp_path / "out" / "inner")
    with output_held(args):
        with output_held(args):
            assert not hold_output(args)
        assert os.listdir(args.output_dir) == [LOCK]
    # It was made for the lock, and nothing came into it.
    assert not (tmp_path / "out").exists()
    with contextlib.suppress(KeyError), output_held(args):
        (Path(args.output_dir) / "config.json").touch()
        raise KeyError
    assert os.listdir(args.output_dir) == ["config.json"]


def test_a_rank_that_does_not_write_takes_no_lock(start_owner, tmp_path):
    start_owner(tmp_path)
    assert hold_output(args_of(tmp_path, should_save=False))
    release_output(args_of(tmp_path))
    assert (tmp_path / LOCK).exists()


def test_where_the_file_cannot_be_written_the_run_goes_on_to_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with output_held(args_of(tmp_path / "file")):
        pass
    # A full disk has room for a name, and not for what is in it.
    monkeypatch.setattr(
        locks.os, "pwrite", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with output_held(args_of(tmp_path)):
        assert (tmp_path / LOCK).read_text() == ""
    assert os.listdir(tmp_path) == ["file"]


def test_a_second_command_changes_nothing_in_the_directory_of_a_running_one(start_owner, stage_flags, tmp_path, capfd):
    from llava_lite.train.train import main

    out = tmp_path / "out"
    staged = out / "tmp-checkpoint-4"
    staged.mkdir(parents=True)
    (staged / "model").write_text("half")
    (out / "trainer_state.json").write_text("{}")
    start_owner(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != LOCK}
    with pytest.raises(SystemExit) as end:
        main(stage_flags("projector", out))
    assert end.value.code == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if "is in use by another run" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"llava-lite train: --output_dir '{out}' is in use by another run (host ")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != LOCK} == before


def test_a_trainer_that_a_program_has_made_is_refused_before_its_first_step(start_owner, tmp_path):
    trainer = runpy.run_path(str(HERE / "plain_run.py"))["build_trainer"](tmp_path)
    start_owner(tmp_path)
    with pytest.raises(OutputInUse, match="is in use by another run"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert os.listdir(tmp_path) == [LOCK]


def test_a_run_leaves_no_lock_in_its_directory_and_may_be_followed_by_another(stage_flags, tmp_path, monkeypatch):
    from llava_lite.hub.push import files_to_share
    from llava_lite.train.train import prepare, run

    out = tmp_path / "out"
    stage = prepare(stage_flags("projector", out, "--max_steps", "1"))
    assert os.listdir(out) == [LOCK]
    seen, replace = [], os.replace

    def noted(source, target):
        replace(source, target)
        # The last file that a run writes.
        if Path(target) == out / "trainer_state.json":
            seen.append(os.listdir(out))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", noted)
        run(stage)
    assert LOCK in seen[-1]
    assert LOCK not in os.listdir(out)
    shutil.copy(out / "config.json", out / LOCK)
    assert LOCK not in files_to_share(out)
    (out / LOCK).unlink()
    run(prepare(stage_flags("projector", out, "--max_steps", "2")))
    with pytest.raises(ValueError, match="holds no checkpoint-N"):
        prepare([*stage_flags("projector", tmp_path / "new"), "--resume_from_checkpoint", "True"])
    assert not (tmp_path / "new").exists()
