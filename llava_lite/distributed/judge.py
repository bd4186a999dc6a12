"""Decide from what the ranks report who hangs, and say it."""

from collections.abc import Sequence
from typing import NamedTuple

from llava_lite.distributed.activity import LONG

# A rank that gives no sign of life for so long is lost, unless it is at something that may take long.
SILENT_S = 45
# Reports come every second; a rank that is silent for so long is not just slow.
NOTICED_S = 10
# One warning is given before a run ends.
WARN_S = 60
# A rank that has ended lets the others end by their own errors first, which say more.
ENDED_S = 20


class RankState(NamedTuple):
    """What a rank reports, or another sees of it.

    text, kind, place: of its activity. age_s: seconds since it began. waits: it waits for other ranks. code: where its
    main thread is. ended: why it has left the run, "" if it has not. silent_s: seconds since it reported. stopped,
    gone: what its process is, seen on the same host.
    """

    rank: int
    host: str
    pid: int
    start: str | None = None
    text: str = ""
    kind: str = LONG
    place: int = 0
    age_s: float = 0.0
    waits: bool = False
    code: str = ""
    ended: str = ""
    silent_s: float = 0.0
    stopped: bool = False
    gone: bool = False

    @property
    def name(self) -> str:
        """The rank and its process."""
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def doing(self) -> str:
        """What it did when it reported last, and for how long."""
        where = "waiting for other ranks, " if self.waits else ""
        code = f", {where}at {self.code}" if self.code else ""
        return f"at '{self.text}' for {self.age_s:.0f} s{code}"

    @property
    def fault(self) -> str:
        """What is wrong with it, with its name."""
        if self.ended:
            return f"{self.name} has ended with an error: {self.ended.rstrip('.')}"
        if self.gone:
            return f"{self.name} is gone, killed or crashed; it was last seen {self.doing}"
        if self.stopped or self.silent_s >= NOTICED_S:
            how = "is stopped (SIGSTOP or a debugger)" if self.stopped else "gives no sign of life"
            return f"{self.name} {how} for {self.silent_s:.0f} s; it was last seen {self.doing}"
        return f"{self.name} hangs {self.doing}"


# The mark of a rank that has left the run without an error.
DONE = "done"
ADVICE = "Start the run again to resume from its last checkpoint."


def find_lost(states: Sequence[RankState], timeout_s: float) -> list[RankState]:
    """Return the ranks that give no sign of life: stopped, killed, their host gone."""
    lost = []
    for state in states:
        limit = SILENT_S if state.stopped or state.kind != LONG else max(SILENT_S, timeout_s)
        if state.ended != DONE and (state.gone or state.silent_s >= limit):
            lost.append(state)
    return lost


def describe_lost(lost: Sequence[RankState]) -> str:
    """Return the message for ranks that are lost."""
    return f"{'; '.join(state.fault for state in lost)}. {ADVICE}"


def find_stalled(states: Sequence[RankState], limit_s: float) -> list[RankState]:
    """Return whom all wait for, where no rank has made progress for `limit_s` seconds and one waits for another.

    Those behind the others, and of these the ones that do not wait themselves; [] while a rank makes progress, and
    where all are equally far in something that may take long.
    """
    here = [state for state in states if state.ended != DONE]
    if len(here) < 2 or min(state.age_s + state.silent_s for state in here) < limit_s:
        return []
    behind = [state for state in here if state.place == min(one.place for one in here)]
    working = [state for state in behind if not state.waits]
    if len(working) == len(here) and here[0].kind == LONG:
        return []
    # Where all of them wait, it is for one another. A place is certain; that one does not wait is not: on a device no
    # stack shows it.
    return working or behind


def describe_stalled(stalled: Sequence[RankState], num_ranks: int, timeout_s: float) -> str:
    """Return the message that ends a run, of what `find_stalled` found."""
    found = "; ".join(state.fault for state in stalled)
    if all(state.waits for state in stalled) and len(stalled) > 1:
        found = f"the ranks wait for one another: {found}"
    return (
        f"{found}. None of {num_ranks} ranks has made progress for --ddp_timeout {timeout_s:.0f} seconds. {ADVICE} "
        "Raise the flag if the rank was only slow."
    )


def describe_waiting(stalled: Sequence[RankState], timeout_s: float) -> str:
    """Return the warning that comes before."""
    found = "; ".join(state.fault for state in stalled)
    return f"no rank makes progress: {found}. The run ends after --ddp_timeout {timeout_s:.0f} seconds."
