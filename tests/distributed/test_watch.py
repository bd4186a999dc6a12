"""Two ranks of which one hangs, stops or dies: both end, and it is said which one and what it did last."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llava_lite.distributed import activity
from llava_lite.distributed.activity import LOADER, STEP, NotedBatches, get_activity, note
from llava_lite.distributed.judge import RankState
from llava_lite.distributed.processes import get_start
from llava_lite.distributed.watch import Watch, start_watch, stop_watch

WORKER = Path(__file__).with_name("watch_worker.py")
ROOT = Path(__file__).parents[2]


def run_ranks(directory, timeout_s, fault, limit_s=240):
    """Return the exit codes and the standard errors of two ranks; TimeoutExpired if they hang."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command, ranks = [sys.executable, str(WORKER), str(timeout_s), fault], []
    for rank in range(2):
        log = open(directory / f"{rank}.log", "w")  # noqa: SIM115 - the process writes to it
        ranks.append(subprocess.Popen(command, env=env | {"RANK": str(rank)}, stderr=log))
    try:
        codes = [rank.wait(limit_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return codes, [(directory / f"{rank}.log").read_text() for rank in range(2)]


@pytest.mark.slow
def test_ranks_that_work_end_without_a_word_of_the_watch(tmp_path):
    codes, errors = run_ranks(tmp_path, 5, "none")
    assert codes == [0, 0]
    assert "llava-lite train" not in "".join(errors)


def test_a_rank_that_hangs_ends_both_and_is_named_with_what_it_did(tmp_path):
    codes, errors = run_ranks(tmp_path, 5, "hang")
    assert codes == [1, 1]
    said = [line for line in "".join(errors).splitlines() if line.startswith("llava-lite train")]
    assert len(said) == 1, said
    assert re.search(
        r"rank 1 \(host \S+, pid \d+\) hangs at 'step 3: forward' for \d+ s, at \S+watch_worker\.py:\d+ in hang: "
        r"time\.sleep\(10_000\)\. None of 2 ranks has made progress for --ddp_timeout 5 seconds\.",
        said[0],
    )


@pytest.mark.slow
def test_ranks_in_different_collectives_are_said_to_wait_for_one_another(tmp_path):
    codes, errors = run_ranks(tmp_path, 5, "both_wait")
    assert codes == [1, 1]
    assert "the ranks wait for one another: rank 0 (host" in "".join(errors)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell what processes do")
@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("kill", "is gone, killed or crashed; it was last seen at"),
        ("error", "ended with an error: ValueError: the disk"),
    ],
)
def test_a_rank_that_dies_is_named_by_the_one_that_remains(tmp_path, fault, found):
    codes, errors = run_ranks(tmp_path, 600, fault)
    assert codes[0] == 1
    last = errors[0].splitlines()[-1]
    assert "LostRankError: rank 1 (host" in last
    assert found in last


class Reports:
    """An exchange between two ranks whose reports a test sets."""

    end = ""

    def __init__(self):
        self.mine, self.reports, self.num_done = {}, [b"", b""], 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell what processes do")
@pytest.mark.parametrize("last", ["ValueError: the disk is full", ""])
def test_a_rank_is_said_to_be_gone_only_after_its_last_report_could_be_read(last):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        members = [RankState(rank, "here", pid, get_start(pid)) for rank, pid in enumerate((os.getpid(), process.pid))]
        reports = Reports()
        watch = Watch(600, members, 0, reports, leave=end)
        process.communicate(b"\n")
    said = []
    explaining = threading.Thread(target=lambda: said.append(watch.explain()))
    explaining.start()
    explaining.join(1)
    assert said == []
    if last:
        reports.reports[1] = json.dumps(members[1]._replace(ended=last)._asdict()).encode()
    reports.num_done += 2
    explaining.join(30)
    found = f"has ended with an error: {last}." if last else "is gone, killed or crashed; it was last seen at"
    assert said[0].startswith(f"rank 1 (host here, pid {process.pid}) {found}")


def test_a_rank_whose_collective_timed_out_names_the_one_that_hangs():
    note("evaluation at step 2: has all batches")
    members = [RankState(0, "here", os.getpid()), RankState(1, "there", 7)]
    reports = Reports()
    watch = Watch(15, members, 0, reports, leave=end)
    hangs = members[1]._replace(text=get_activity().text, place=get_activity().place, age_s=20.0)
    reports.reports[1] = json.dumps(hangs._asdict()).encode()
    reports.num_done += 1
    watch._since_s -= 20
    assert watch.explain(limit_s=0.1).startswith(
        "rank 1 (host there, pid 7) hangs at 'evaluation at step 2: has all batches' for 20 s. None of 2 ranks"
    )
    reports.reports[1] = json.dumps(hangs._replace(age_s=3.0)._asdict()).encode()
    assert watch.explain(limit_s=0.1) == ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell what processes do")
def test_a_rank_that_is_stopped_ends_both_long_before_the_timeout(tmp_path):
    codes, errors = run_ranks(tmp_path, 100_000, "stop")
    assert codes == [1, -9]
    assert re.search(r"rank 1 \(host \S+, pid \d+\) is stopped \(SIGSTOP or a debugger\) for 4\d s", errors[0])


class Ended(Exception):
    """The process would have ended."""


def end(code):
    raise Ended(code)


def look_again(watch, seconds):
    """Let the watch look as if it had been awake for so long."""
    watch._since_s -= seconds
    watch.tick()


@pytest.fixture
def alone():
    """The watch of a single process whose loader has workers."""
    return Watch(15, [RankState(0, "here", os.getpid())], 0, has_workers=True, leave=end)


class Readers:
    def describe(self):
        return "worker 1 (pid 7) has been reading toy.json[3] for 16 s"


def test_a_loader_that_gives_nothing_ends_the_run_with_what_its_worker_reads(alone, capsys):
    note("step 4: waiting for a batch of the loader", LOADER, readers=Readers())
    alone.tick()
    with pytest.raises(Ended, match="1"):
        look_again(alone, 15)
    assert capsys.readouterr().err == (
        "llava-lite train: the data loader has given no batch for 15 s at 'step 4: waiting for a batch of the "
        "loader': worker 1 (pid 7) has been reading toy.json[3] for 16 s. That is --ddp_timeout 15 seconds. Start the "
        "run again to resume from its last checkpoint.\n"
    )


def test_a_loader_is_waited_for_with_one_warning_before_that(caplog):
    watch = Watch(1000, [RankState(0, "here", os.getpid())], 0, has_workers=True, leave=end)
    note("step 4: waiting for a batch of the loader", LOADER, readers=Readers())
    watch.tick()
    look_again(watch, 70)
    look_again(watch, 70)
    assert [record.getMessage() for record in caplog.records if "has given no batch for" in record.getMessage()] == [
        "the data loader has given no batch for 70 s at 'step 4: waiting for a batch of the loader': worker 1 (pid 7) "
        "has been reading toy.json[3] for 16 s."
    ]


@pytest.mark.parametrize("kind", [STEP, activity.LONG])
def test_a_single_process_may_work_or_stand_in_a_debugger_for_ever(alone, kind):
    note("step 4: forward", kind)
    alone.tick()
    look_again(alone, 1e6)


def test_a_single_process_without_workers_may_stand_in_a_debugger_while_it_reads():
    watch = Watch(15, [RankState(0, "here", os.getpid())], 0, has_workers=False, leave=end)
    note("step 4: waiting for a batch of the loader", LOADER)
    watch.tick()
    look_again(watch, 1e6)


def test_time_in_which_the_machine_was_suspended_does_not_count(alone):
    note("step 4: waiting for a batch of the loader", LOADER)
    alone.tick()
    alone._before_s -= 1e6
    alone.tick()


def test_a_single_process_without_workers_has_no_thread_that_watches():
    before = threading.active_count()
    start_watch(15, has_workers=False)
    assert threading.active_count() == before
    start_watch(15, has_workers=True)
    assert threading.active_count() == before + 1
    stop_watch()
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert threading.active_count() == before


def test_waiting_for_a_batch_is_noted_and_its_arrival_too():
    def batches():
        assert (get_activity().text, get_activity().kind) == ("step 2: waiting for a batch of the loader", LOADER)
        yield "batch"

    place = get_activity().place
    noted = NotedBatches(batches(), "step 2", then=STEP)
    assert next(noted) == "batch"
    assert (get_activity().text, get_activity().kind) == ("step 2: has a batch", STEP)
    assert get_activity().place == place + 2
    assert list(noted) == []
