"""SIGTERM, SIGINT and SIGHUP as people, terminals, schedulers and launchers send them to real processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llava_lite.train.saving.manifest import newest_complete_checkpoint
from llava_lite.train.saving.signals import SAME_SIGNAL_S, SIGNALS, SignalWatch

HERE = Path(__file__).parents[1]
# A long run with a save that says when it begins, and waits.
RUN = """
import os, sys, time
sys.path.insert(0, {here!r})
from plain_run import PlainTrainer, build_trainer
save = PlainTrainer._save_checkpoint
def slow_save(trainer, model, trial):
    print("saving", flush=True)
    {wait}
    save(trainer, model, trial)
PlainTrainer._save_checkpoint = slow_save
build_trainer({out!r}, num_train_epochs=2000, save_steps=10**6, logging_steps=1, dataloader_num_workers=2).train()
"""
# Inside a library that does not return to Python, as a collective whose other ranks are gone.
IN_A_LIBRARY = "import ctypes; [ctypes.CDLL(None).sleep(600) for _ in range(9)]"


def start(out, wait="", **options):
    """Start the run in a process group of its own and return it when it trains."""
    paths = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    run = subprocess.Popen(
        [sys.executable, "-c", RUN.format(here=str(HERE), out=str(out), wait=wait)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True, **options,
    )  # fmt: skip
    next(line for line in run.stdout if "'loss'" in line)
    return run


@pytest.fixture
def runs():
    """Processes that are ended with the test, with all that they have started."""
    started = []
    yield started
    for run in started:
        try:
            os.killpg(run.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        run.wait()


# SIGTERM: test_checkpoint.py.
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_to_the_process_tree_saves_and_leaves_with_75(runs, tmp_path, number):
    runs.append(start(tmp_path))
    os.killpg(runs[0].pid, number)
    _, errors = runs[0].communicate(timeout=300)
    assert runs[0].returncode == 75, errors
    assert f"{number.name}: {newest_complete_checkpoint(tmp_path)} is saved, leaving with code 75" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("wait", ["time.sleep(600)", IN_A_LIBRARY], ids=["python", "library"])
def test_a_second_ctrl_c_ends_the_run_at_once_and_says_that_nothing_is_saved(runs, tmp_path, wait):
    runs.append(start(tmp_path, wait))
    os.killpg(runs[0].pid, signal.SIGINT)
    next(line for line in runs[0].stdout if line == "saving\n")
    time.sleep(2 * SAME_SIGNAL_S)
    os.killpg(runs[0].pid, signal.SIGINT)
    _, errors = runs[0].communicate(timeout=120)
    assert runs[0].returncode == 130
    assert errors.splitlines()[-1] == (
        "llava-lite train: SIGINT again: the run ends at once, and nothing more is saved."
    )
    assert newest_complete_checkpoint(tmp_path) is None


def test_a_ctrl_c_that_a_launcher_passes_on_counts_once(runs, tmp_path):
    # The terminal sends it, and so does the launcher, at almost the same moment; then the launcher asks to end.
    runs.append(start(tmp_path, "time.sleep(2)"))
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        os.killpg(runs[0].pid, number)
        time.sleep(0.05)
    _, errors = runs[0].communicate(timeout=300)
    assert runs[0].returncode == 75, errors
    assert "SIGINT: " in errors


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_that_is_ignored_when_the_process_begins_stays_ignored(runs, tmp_path, number):
    # As nohup does with SIGHUP, and a shell with SIGINT for a job in the background.
    runs.append(start(tmp_path, preexec_fn=lambda: signal.signal(number, signal.SIG_IGN)))
    os.killpg(runs[0].pid, number)
    for _ in range(20):
        assert "'loss'" in runs[0].stdout.readline()
    os.killpg(runs[0].pid, signal.SIGTERM)
    _, errors = runs[0].communicate(timeout=300)
    assert runs[0].returncode == 75, errors
    assert "SIGTERM: " in errors


def test_handlers_and_mask_are_those_of_before_when_it_is_over():
    def own(number, frame):
        pass

    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, own)
    try:
        watch = SignalWatch()
        watch.listen()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set(SIGNALS)
        assert watch.number == 0
        os.kill(os.getpid(), signal.SIGHUP)
        assert watch.number == signal.SIGHUP
        watch.hand_back(forget=True)
        assert signal.getsignal(signal.SIGHUP) is own
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_thread_other_than_the_main_one_leaves_signals_alone():
    before = [signal.getsignal(number) for number in SIGNALS]
    watch = SignalWatch()
    thread = threading.Thread(target=watch.listen)
    thread.start()
    thread.join()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    watch.hand_back()
    assert watch.number == 0


def test_the_descriptor_of_an_event_loop_is_left_to_it():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    watch = SignalWatch()
    try:
        watch.listen()
        os.kill(os.getpid(), signal.SIGHUP)
        assert watch.number == signal.SIGHUP
    finally:
        watch.hand_back(forget=True)
        assert signal.set_wakeup_fd(-1) == writer
        os.close(reader)
        os.close(writer)
