"""Remember which records a run leaves out because they cannot be read: the same on every rank, until its end.

Batches are formed on every rank before a record is read and its images are decoded. A record that turns out to be
broken keeps its place in the order as an empty example: one token that is not supervised. So the order of records, the
number of steps and the records of each rank still depend on seed and epoch only, and no rank waits for another. The
loss of a step with such a record is divided by the supervised tokens that it has (by 1 if it has none: a loss of 0 and
no gradient). Without the record, later epochs would have other batches, and maybe fewer, than a resumed run expects;
another record in its place would be trained on twice.

The records found are exchanged at the end of each step, and are written to the skipped-records log and to every later
checkpoint. A resumed run reads both, with entries of the log that are newer than its checkpoint. It leaves out each
record from the epoch on in which it was found. A record comes once an epoch, so every step is the same again, even if
the file has been corrected. Shards, whose records are not counted, use the next record of the stream instead
(shards/stream.py).
"""

import torch

from llava_lite.constants import IGNORE_INDEX

# Further records are not shared with the other workers, which find them by themselves.
MAX_REPORTED = 2**20


class LeftOut:
    """Numbers of records, each with the time from which on it is left out; shared with the data-loader workers.

    It is in shared memory, since workers may live as long as the run. Times are increasing integers: epochs in
    training, steps in evaluations. room: the largest number of records.
    """

    def __init__(self, room: int):
        # Row 0 holds the number of entries and the current time; each other row a record's number and its time.
        self.table = torch.zeros(min(room, MAX_REPORTED) + 1, 2, dtype=torch.int64).share_memory_()
        self._known = {}
        self._num_read = 0

    def begin(self, time: int) -> None:
        """Set the current time, before a loader begins to read."""
        self.table[0, 1] = time

    @property
    def now(self) -> int:
        """The current time."""
        return int(self.table[0, 1])

    def add(self, place: int, since: int) -> None:
        """Leave a record out from a time on; an earlier time replaces a later one."""
        count = int(self.table[0, 0])
        if count + 1 < len(self.table):
            self.table[count + 1] = torch.tensor([place, since])
            # Written last: a worker that reads this number finds complete entries.
            self.table[0, 0] = count + 1

    def has(self, place: int, time: int | None = None) -> bool:
        """Return whether a record is left out, now or at another time."""
        count = int(self.table[0, 0])
        for known, since in self.table[self._num_read + 1 : count + 1].tolist():
            self._known[known] = min(since, self._known.get(known, since))
        self._num_read = count
        since = self._known.get(place)
        return since is not None and since <= (self.now if time is None else time)


def empty_example(name: str, pad_token_id: int | None) -> dict:
    """Return the example in place of a record that is left out: one token, not supervised."""
    ids = torch.tensor([pad_token_id or 0])
    return {"id": name, "input_ids": ids, "labels": torch.full_like(ids, IGNORE_INDEX)}
