"""What loader workers read, as the parent process sees it."""

import os
import signal
import time
from multiprocessing import get_context

import pytest
from torch.utils.data import DataLoader, Dataset

from llava_lite.data.errors import DataError
from llava_lite.data.reading import ReadingNotes, dead_workers_named


class Records(Dataset):
    """Eight records of which number 5 has a fault."""

    def __init__(self, num_workers, fault=None):
        self.reading, self.fault = ReadingNotes(num_workers), fault

    def __len__(self):
        return 8

    def __getitem__(self, i):
        self.reading.begin(f"toy.json[{i}]")
        if i == 5 and self.fault is not None:
            self.fault()
        self.reading.end()
        return i


def wait_for(condition, limit_s=60):
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def test_the_record_that_a_worker_hangs_at_is_seen_from_outside():
    go_on = get_context().Event()
    data = Records(2, fault=go_on.wait)
    batches = iter(DataLoader(data, 1, num_workers=2, prefetch_factor=4))
    # Worker 1 has the odd ones.
    wait_for(lambda: "toy.json[5]" in data.reading.describe())
    (worker, pid, _, text), *others = sorted(data.reading.read(), key=lambda line: -line[2])
    assert (worker, text, pid != os.getpid()) == (1, "toy.json[5]", True)
    assert data.reading.describe().startswith(f"worker 1 (pid {pid}) has been reading toy.json[5] for ")
    assert [line[2] for line in others] == [0.0]
    go_on.set()
    assert len(list(batches)) == 8


def test_a_worker_that_is_killed_is_named_with_its_record():
    data = Records(2, fault=lambda: os.kill(os.getpid(), signal.SIGKILL))
    with (
        pytest.raises(
            DataError, match=r"^worker 1 \(pid \d+\) of the data loader was killed .* reading toy.json\[5\]"
        ),
        dead_workers_named(None, data.reading),
    ):
        list(DataLoader(data, 1, num_workers=2))


def test_a_worker_that_is_killed_before_its_first_record_is_named():
    data = Records(2)
    loader = DataLoader(data, 1, num_workers=2, worker_init_fn=lambda worker: os.kill(os.getpid(), signal.SIGKILL))
    with (
        pytest.raises(DataError, match=r"^a worker \(pid \d+\) of the data loader .* had not begun to read\. Mostly"),
        dead_workers_named(None, data.reading),
    ):
        list(loader)


def test_another_error_is_raised_as_it_is():
    data = Records(1)
    list(DataLoader(data, 1))
    with pytest.raises(RuntimeError, match="of another kind"), dead_workers_named(data.reading):
        raise RuntimeError("of another kind")


def test_a_worker_that_ended_as_it_should_has_not_died():
    data = Records(2)
    list(DataLoader(data, 1, num_workers=2))
    with pytest.raises(ConnectionResetError), dead_workers_named(data.reading):
        raise ConnectionResetError("of another program")


def test_workers_that_wait_say_what_they_read_last():
    data = Records(1)
    assert data.reading.describe() == "no worker has begun to read"
    assert [int(batch) for batch in DataLoader(data, 1)] == list(range(8))
    assert data.reading.describe() == "this process has last read toy.json[7]"


def test_a_long_name_is_cut():
    notes = ReadingNotes(1)
    notes.begin("ä" * 5000)
    assert notes.read()[0][3].startswith("ä" * 400)
