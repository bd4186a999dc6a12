"""Exchange short reports between ranks while their main threads may be stuck in a collective."""

import json
import os
import threading
import time
from datetime import timedelta

import torch.distributed as dist

INTERVAL_S = 1.0
# Of one request; a store that has stopped may keep a request for ever all the same.
_REQUEST = timedelta(seconds=10)


class Exchange(threading.Thread):
    """A thread that reports for this rank and reads the reports of all, through the store of the process group.

    It has a connection of its own: a main thread in a collective may hold the group's. It is a thread of its own,
    since a store whose process is stopped answers nothing, and its reader waits for ever. All ranks must make one.

    serial: number of the watch in this process, equal on all ranks. reports: the last report of each rank as bytes;
    num_done: exchanges so far. end: the message with which a rank has ended the run, "" before that.
    """

    def __init__(self, serial: int, rank: int, num_ranks: int):
        super().__init__(name="reports of ranks", daemon=True)
        self.store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=_REQUEST,
        )
        prefix = f"llava_lite/watch/{serial}"
        self.keys = [f"{prefix}/{number}" for number in range(num_ranks)]
        self.rank, self.end_key = rank, f"{prefix}/end"
        self.mine, self.reports, self.num_done, self.end = {}, [b""] * num_ranks, 0, ""
        self.wish, self.is_first = "", None
        self._last = threading.Event()
        # There before anyone reads: a store waits for a key that it does not have.
        self.store.set(self.keys[rank], "")
        self.store.set(self.end_key, "")

    def run(self):
        """Exchange until the last report is sent."""
        is_last, num_failed = False, 0
        while not is_last and num_failed < 3:
            is_last = self._last.is_set()
            try:
                self.exchange()
                num_failed = 0
            except (RuntimeError, OSError):
                # Slow, or gone for good; whoever judges sees that `num_done` stands still.
                num_failed += 1
            self._last.wait(INTERVAL_S)

    def exchange(self) -> None:
        """Send the report of this rank and read those of all; end the run if this rank wishes to and is the first."""
        self.store.set(self.keys[self.rank], json.dumps(self.mine | {"beat": self.num_done}))
        if self.wish and self.is_first is None:
            kept = self.store.compare_set(self.end_key, "", self.wish).decode()
            self.is_first = kept == self.wish
        *reports, end = self.store.multi_get([*self.keys, self.end_key])
        self.reports, self.end = reports, end.decode()
        self.num_done += 1

    def end_run(self, message: str, limit_s: float) -> bool:
        """Ask all ranks to end with a message; return whether this rank is to print it: the first that asks."""
        self.wish = message
        deadline = time.monotonic() + limit_s
        while self.is_first is None and time.monotonic() < deadline:
            time.sleep(0.1)
        # Of ranks that reach no store any more, each prints its message.
        return self.is_first is not False

    def stop(self, limit_s: float = 3.0) -> None:
        """Send a last report and end the thread."""
        self._last.set()
        if self.is_alive():
            self.join(limit_s)
