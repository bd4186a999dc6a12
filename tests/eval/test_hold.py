"""A directory of answers is held while a process works in it; a second one changes nothing, a dead one holds none."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from llava_lite.eval.answers import AnswerFile, compare
from llava_lite.eval.hold import begin, hold, remove_locks
from llava_lite.eval.questions import Question
from llava_lite.eval.ranks import Ranks

RUN = {"model": "a"}
HOLDER = """
import sys, time
from pathlib import Path
from llava_lite.eval.hold import hold
with hold(Path(sys.argv[1]), 1, 0):
    print("holds", flush=True)
    time.sleep(600)
"""


def enter(manager):
    """Enter a context and leave it."""
    with manager:
        pass


def content(directory):
    """Return {name: bytes} of the files that are no locks."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".lock"}


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ((1, 0), (1, 0), "answers the questions in"),
        ((2, 1), (2, 1), "answers chunk 1 of 2 in"),
        ((2, 1), (1, 0), "answers chunk 1 of 2 in"),
        ((1, 0), (2, 0), "answers the questions in"),
        ((3, 0), (2, 1), "answers chunk 0 of 3 in"),
        ((2, 1), (2, None), "answers chunk 1 of 2 in"),
        ((2, None), (2, 1), "joins the chunks in"),
        ((2, None), (2, None), "joins the chunks in"),
    ],
)
def test_a_second_process_is_refused_until_the_first_has_ended(first, second, says, tmp_path):
    message = rf"^another process {says} .*out at this moment\. Wait until"
    with hold(tmp_path / "out", *first), pytest.raises(BlockingIOError, match=message):
        enter(hold(tmp_path / "out", *second, start=pytest.fail))
    enter(hold(tmp_path / "out", *second))


def test_chunks_of_one_number_work_side_by_side_and_know_of_each_other(tmp_path):
    found = []
    with ExitStack() as stack:
        for index in (1, 0, 2):
            stack.enter_context(hold(tmp_path, 3, index, found.append))
        # A refused one leaves what the others hold.
        for _ in range(2):
            with pytest.raises(BlockingIOError, match="answers chunk 0 of 3"), hold(tmp_path, 3, 0):
                pass
    with hold(tmp_path, 3, 2, found.append):
        assert found == [True, False, False, True]
    remove_locks(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_killed_holds_nothing(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "holds\n"
    with pytest.raises(BlockingIOError, match="another process answers the questions"), hold(tmp_path, 1, 0):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    # Its lock file lies there, and nobody holds it.
    assert (tmp_path / ".part_0_of_1.lock").exists()
    with hold(tmp_path, 1, 0):
        pass


def test_nothing_is_deleted_or_claimed_under_a_running_process(tmp_path):
    alone = Ranks(1, None)
    with begin(tmp_path, RUN, alone, overwrite=False):
        AnswerFile(tmp_path).append({0: (Question(1, "What?"), "it")}, "a")
        kept = content(tmp_path)
        for run, ranks, overwrite in (
            (RUN, alone, True),
            ({"model": "b"}, alone, True),
            (RUN, Ranks(2, 0), False),
            (RUN, alone, False),
        ):
            with pytest.raises(BlockingIOError), begin(tmp_path, run, ranks, overwrite):
                pass
            assert content(tmp_path) == kept
    with begin(tmp_path, {"model": "b"}, alone, overwrite=True):
        assert set(content(tmp_path)) == {"run.json"}


def test_a_chunk_of_another_run_is_refused_before_the_first_answer(tmp_path):
    with begin(tmp_path, RUN, Ranks(2, 0), overwrite=False):
        with pytest.raises(ValueError, match="holds the answers of another run: model is 'b' now and was 'a'"):
            enter(begin(tmp_path, {"model": "b"}, Ranks(2, 1), overwrite=False))
        enter(begin(tmp_path, RUN, Ranks(2, 1), overwrite=False))
    compare(tmp_path, RUN)
    # Nobody is there and no answer either: the directory is free.
    with begin(tmp_path, {"model": "b"}, Ranks(2, 1), overwrite=False):
        compare(tmp_path, {"model": "b"})


def test_what_is_checked_first_changes_nothing(tmp_path):
    def check():
        raise FileExistsError("mine")

    with begin(tmp_path, RUN, Ranks(1, None), overwrite=False):
        AnswerFile(tmp_path).append({0: (Question(1, "What?"), "it")}, "a")
    kept = content(tmp_path)
    with pytest.raises(FileExistsError, match="mine"):
        enter(begin(tmp_path, RUN, Ranks(1, None), overwrite=True, check=check))
    assert content(tmp_path) == kept


def test_every_rank_holds_its_part_before_the_first_one_deletes(tmp_path):
    def rank(index, wait=lambda: None):
        return SimpleNamespace(asks=True, is_launched=True, is_first=index == 0, count=2, index=index, wait=wait)

    def look():
        found.append(sorted(content(tmp_path)))

    with begin(tmp_path, RUN, rank(1), overwrite=False), begin(tmp_path, RUN, rank(0), overwrite=False):
        AnswerFile(tmp_path, 2).append({0: (Question(1, "What?"), "it")}, "a")
    found = []
    with begin(tmp_path, RUN, rank(0, look), overwrite=True), begin(tmp_path, RUN, rank(1), overwrite=True):
        pass
    assert found == [["part_0_of_2.jsonl", "run.json"], ["run.json"]]
