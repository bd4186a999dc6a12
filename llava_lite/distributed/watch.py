"""End a run in which a rank or a loader worker hangs, and say which one and what it did last.

Without it the others wait in a collective: for 10 to 30 minutes, and then for an error that names no rank. What torch
has does parts of this: its monitored barrier names who did not come, to a barrier only; the flight recorder and the
watchdog are NCCL's; the timers of torch.distributed.elastic need its launcher and end a worker without a word.

Each rank notes what it does (activity.py), a thread reports it to the others (exchange.py), and another thread judges
the reports (judge.py). A main thread that is stuck can raise nothing, so the process ends by `os._exit`.
"""

import json
import logging
import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from contextlib import contextmanager

import torch.distributed as dist

from llava_lite.distributed import judge
from llava_lite.distributed.activity import LOADER, describe_place, get_activity, get_stack, is_in_collective
from llava_lite.distributed.exchange import INTERVAL_S, Exchange
from llava_lite.distributed.judge import RankState
from llava_lite.distributed.processes import end_process, get_start, is_gone, is_stopped
from llava_lite.distributed.ranks import everyone

logger = logging.getLogger(__name__)

EXIT_HANGS = 1
# From here on a stack is looked at; before, nothing is slow.
_LOOK_S = 3
# How long a rank that got an error from a collective looks for the one that caused it.
_EXPLAIN_S = 12
_SILENT_AFTER_ERROR_S = 8
# A process that has ended may have sent why: after so many exchanges the last report is here, if there is one.
_LAST_REPORT_EXCHANGES, _LAST_REPORT_S = 2, 5


class LostRankError(RuntimeError):
    """A collective failed because another rank is gone."""


class Watch(threading.Thread):
    """The thread that judges.

    timeout_s: --ddp_timeout. members: each rank, its host and process. exchange: None for a single process.
    has_workers: whether a loader reads in other processes. on_end: called before this process ends by a verdict.
    """

    def __init__(self, timeout_s: float, members, rank: int, exchange=None, has_workers=False, on_end=(), leave=None):
        super().__init__(name="watch on ranks", daemon=True)
        self.timeout_s, self.members, self.rank, self.exchange = timeout_s, list(members), rank, exchange
        self.has_workers, self.on_end, self.leave = has_workers, list(on_end), leave or os._exit
        # Seconds that this process was awake: none of a time in which all ranks, or the machine, were suspended.
        self.awake_s, self._before_s = 0.0, time.monotonic()
        self._serial, self._since_s, self._num_exchanges, self._in_touch_s = None, 0.0, 0, 0.0
        self.seen = {member.rank: (b"", member, 0.0) for member in self.members}
        # For each rank whose process has ended: the exchanges and the time at which that was seen.
        self._seen_gone = {}
        self._warned, self._stopping = False, threading.Event()
        self._lock = threading.Lock()
        self.is_ending = False
        self.look()

    def run(self):
        """Judge every second until the watch is stopped."""
        if self.exchange is not None:
            self.exchange.start()
        while not self._stopping.wait(INTERVAL_S):
            self.tick()

    def tick(self) -> None:
        """Look once at this process and at the reports of the others, and act."""
        with self._lock:
            if self._stopping.is_set():
                return
            mine = self.look()
            states = self.read(mine)
        if self.exchange is not None and self.exchange.end:
            self.is_ending = True
            self.end_process()
        if message := self.get_verdict(mine, states):
            self.end_run(message, states)

    def look(self) -> RankState:
        """Return the state of this process, which the others get too."""
        now = time.monotonic()
        self.awake_s += min(now - self._before_s, 3 * INTERVAL_S)
        self._before_s = now
        activity = get_activity()
        if activity.serial != self._serial:
            self._serial, self._since_s, self._warned = activity.serial, self.awake_s, False
        age_s = self.awake_s - self._since_s
        stack = get_stack() if age_s >= _LOOK_S else None
        mine = self.members[self.rank]._replace(
            text=activity.text,
            kind=activity.kind,
            place=activity.place,
            age_s=round(age_s, 1),
            waits=stack is not None and is_in_collective(stack),
            code="" if stack is None else describe_place(stack),
        )
        if self.exchange is not None:
            self.exchange.mine = mine._asdict()
        return mine

    def read(self, mine: RankState) -> list[RankState]:
        """Return the states of all ranks, with how long each has been silent."""
        if self.exchange is None:
            return [mine]
        if self.exchange.num_done != self._num_exchanges:
            self._num_exchanges, self._in_touch_s = self.exchange.num_done, self.awake_s
        for rank, report in enumerate(self.exchange.reports):
            if report not in (b"", self.seen[rank][0]):
                fields = {key: value for key, value in json.loads(report).items() if key in RankState._fields}
                self.seen[rank] = report, RankState(**fields), self.awake_s
        out_of_touch_s = self.awake_s - self._in_touch_s
        states = []
        for rank, (_, state, seen_s) in self.seen.items():
            silent_s = self.awake_s - seen_s
            if out_of_touch_s > 3 * INTERVAL_S:
                # Only of the first rank, whose process holds the store: it answers whatever its main thread does.
                silent_s = out_of_touch_s if rank == 0 else 0.0
                state = state._replace(kind=LOADER) if rank == 0 else state
            is_here = state.host == mine.host
            states.append(
                state._replace(
                    silent_s=silent_s,
                    stopped=is_here and is_stopped(state.pid, state.start),
                    gone=is_here and self.is_gone_for_good(state),
                )
            )
        states[self.rank] = mine
        return states

    def is_gone_for_good(self, state: RankState) -> bool:
        """Tell whether a process of this host has ended and its last report, if it sent one, has been read."""
        if not is_gone(state.pid, state.start):
            return False
        num_done, seen_s = self._seen_gone.setdefault(state.rank, (self.exchange.num_done, self.awake_s))
        num_since, since_s = self.exchange.num_done - num_done, self.awake_s - seen_s
        return num_since >= _LAST_REPORT_EXCHANGES or since_s >= _LAST_REPORT_S

    def get_verdict(self, mine: RankState, states: list[RankState]) -> str:
        """Return the message with which the run ends, "" if it goes on."""
        others = [state for state in states if state.rank != self.rank]
        lost = judge.find_lost(others, self.timeout_s)
        failed = [state for state in others if state.ended not in ("", judge.DONE)]
        # An error of its own, which says more, comes to a rank that a collective connects with one that has ended.
        sudden = [state for state in lost if not state.gone]
        if sudden or ((lost or failed) and mine.age_s >= judge.ENDED_S):
            return judge.describe_lost(lost or failed)
        if message := self.get_loader_verdict(mine):
            return message
        if stalled := judge.find_stalled(states, self.timeout_s):
            return judge.describe_stalled(stalled, len(states), self.timeout_s)
        if not self._warned and (stalled := judge.find_stalled(states, judge.WARN_S)):
            self._warned = True
            # One rank warns: the first that is not stuck itself.
            if self.rank == min({state.rank for state in states} - {state.rank for state in stalled}, default=0):
                logger.warning("%s", judge.describe_waiting(stalled, self.timeout_s))
        return ""

    def get_loader_verdict(self, mine: RankState) -> str:
        """Return the message for a loader that gives nothing; without workers a single process reads itself."""
        if mine.kind != LOADER or mine.waits or not (self.has_workers or len(self.members) > 1):
            return ""
        readers = get_activity().readers
        reading = f": {readers.describe()}" if readers is not None else ""
        found = f"the data loader has given no batch for {mine.age_s:.0f} s at '{mine.text}'{reading}"
        where = f"{mine.name}: " if len(self.members) > 1 else ""
        if mine.age_s >= self.timeout_s:
            return f"{where}{found}. That is --ddp_timeout {self.timeout_s:.0f} seconds. {judge.ADVICE}"
        if mine.age_s >= judge.WARN_S and not self._warned:
            self._warned = True
            logger.warning("%s%s.", where, found)
        return ""

    def end_run(self, message: str, states: list[RankState]) -> None:
        """End this process and have the others end, with a message of one of them."""
        self.is_ending = True
        is_first = self.exchange is None or self.exchange.end_run(message, 4 * INTERVAL_S)
        if is_first:
            rank = "" if self.rank == 0 else f" (rank {self.rank})"
            # One write: the lines of several ranks do not mix.
            sys.stderr.write(f"llava-lite train{rank}: {message}\n")
        host = self.members[self.rank].host
        for state in states:
            # It reacts to nothing a launcher would send, and would hold its device.
            if state.stopped and state.host == host:
                end_process(state.pid, state.start)
        self.end_process()

    def end_process(self) -> None:
        """End this process, its loader workers first."""
        sys.stderr.flush()
        if self.exchange is not None and self.rank == 0:
            # Its process holds the store, in which the others still read the verdict.
            time.sleep(3 * INTERVAL_S)
        for worker in multiprocessing.active_children():
            worker.kill()
        for work in self.on_end:
            work()
        self.leave(EXIT_HANGS)

    @property
    def has_verdict(self) -> bool:
        """Whether a rank has ended the run; this process ends as soon as the watch comes to it."""
        return self.is_ending or (self.exchange is not None and self.exchange.end != "")

    def explain(self, limit_s: float = _EXPLAIN_S) -> str:
        """Return which rank is gone or hangs after an error of a collective; "" if none does.

        Waits a moment for evidence.
        """
        deadline = time.monotonic() + limit_s
        while self.exchange is not None and (time.monotonic() < deadline or self.is_ending):
            if self.has_verdict:
                # The watch says why, and ends this process.
                time.sleep(0.2)
                continue
            with self._lock:
                states = [state for state in self.read(self.members[self.rank]) if state.rank != self.rank]
            lost = [
                state
                for state in states
                if state.ended != judge.DONE
                and (state.gone or (state.silent_s >= _SILENT_AFTER_ERROR_S and not state.ended))
            ]
            failed = [state for state in states if state.ended not in ("", judge.DONE)]
            # Those that ended with an error may have done so for the same reason.
            if found := [state for state in lost if not state.ended] or failed:
                return judge.describe_lost(found)
            time.sleep(0.2)
        with self._lock:
            # It did wait, up to the timeout of the group, whatever its stack said.
            states = self.read(self.look()._replace(waits=True))
        stalled = judge.find_stalled(states, self.timeout_s)
        is_other = stalled and all(state.rank != self.rank for state in stalled)
        return judge.describe_stalled(stalled, len(states), self.timeout_s) if is_other else ""

    def stop(self, reason: str = judge.DONE) -> None:
        """End the watch; the other ranks learn why this one has left."""
        self._stopping.set()
        if self.exchange is not None:
            with self._lock:
                self.exchange.mine = self.members[self.rank]._asdict() | {"ended": reason}
            self.exchange.stop()


class _Current:
    """The watch of this process."""

    watch: Watch | None = None
    serial = 0


def start_watch(timeout_s: float, has_workers: bool = False, on_end=()) -> None:
    """Watch over the ranks of the process group and the loader of this process; all ranks must call it."""
    stop_watch()
    is_group = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    rank = dist.get_rank() if is_group else 0
    pid = os.getpid()
    members = everyone(RankState(rank, socket.gethostname(), pid, get_start(pid)))
    exchange = _open_exchange(rank, len(members)) if is_group else None
    if exchange is not None or has_workers:
        _Current.watch = Watch(timeout_s, members, rank, exchange, has_workers, on_end)
        _Current.watch.start()


def _open_exchange(rank: int, num_ranks: int) -> Exchange | None:
    """Return the connection of this rank, None on all of them if one has none."""
    _Current.serial += 1
    exchange, problem = None, ""
    try:
        exchange = Exchange(_Current.serial, rank, num_ranks)
    except (KeyError, RuntimeError, OSError) as error:
        problem = f"{type(error).__name__}: {error}"
    problems = [f"rank {number}: {found}" for number, found in enumerate(everyone(problem)) if found]
    if not problems:
        return exchange
    logger.warning(
        "no watch on ranks that hang: the store of the process group (MASTER_ADDR, MASTER_PORT) is out of reach: %s.",
        "; ".join(problems),
    )
    return None


def stop_watch(reason: str = judge.DONE) -> None:
    """End the watch of this process, if there is one."""
    watch, _Current.watch = _Current.watch, None
    if watch is not None:
        watch.stop(reason)


@contextmanager
def watched():
    """Report an error that ends the run inside to the other ranks; one that a lost rank has caused names that rank."""
    try:
        yield
    except SystemExit:
        # All ranks have agreed to leave.
        stop_watch()
        raise
    except BaseException as error:
        watch, message = _Current.watch, ""
        # Of a run that is being ended, the errors of the other ranks say nothing.
        if watch is not None and watch.exchange is not None and (watch.has_verdict or _is_of_group(error)):
            message = watch.explain()
        stop_watch(message or f"{type(error).__name__}: {error}")
        if message:
            raise LostRankError(message) from error
        raise


def _is_of_group(error: BaseException) -> bool:
    """Tell whether an error comes out of a collective; those of gloo have no class, but name its source."""
    if not isinstance(error, RuntimeError):
        return False
    is_named = isinstance(error, dist.DistError) or "/gloo/" in str(error)
    return is_named or is_in_collective(traceback.extract_tb(error.__traceback__)[::-1])
