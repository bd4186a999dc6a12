"""The end of a rank."""

import threading
import time
from pathlib import Path

import pytest

from llava_lite.distributed.ranks import let_threads_finish


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not tell what threads do")
def test_a_process_ends_after_the_work_of_its_other_threads():
    end = time.monotonic() + 0.4

    def work():
        while time.monotonic() < end:
            sum(range(1000))

    thread = threading.Thread(target=work)
    thread.start()
    let_threads_finish()
    assert not thread.is_alive()


def test_a_process_does_not_wait_for_ever():
    stop = threading.Event()

    def work():
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=work)
    thread.start()
    begin = time.monotonic()
    let_threads_finish(limit_s=0.2)
    stop.set()
    thread.join()
    assert time.monotonic() - begin < 5
