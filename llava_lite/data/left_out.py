"""Remember which records a run leaves out because they cannot be read: the same ones on every rank, for good.

Batches are formed, on every rank alike, before a record is read and an image decoded. One that turns out to be broken
then keeps its place in the order, empty: a single token of which nothing is learned. So the order of records, the
number of steps and who reads what stay functions of seed and epoch, no rank waits for another, and a step without one
of its records is divided by the supervised tokens that it has (by 1 where it has none: a loss of 0 and no gradient).
Taking the record out of the order instead would give later epochs other batches, maybe fewer, than a resumed run
counts with; another record in its place would be learned twice.

What is found is exchanged at the end of each step and stands in the log of skipped records and in every checkpoint
from there on. A run that goes on knows both, those of the log that are newer than its checkpoint too, each from the
epoch on in which it was found: a record comes once an epoch, so every step is again what it was, even if the file has
been mended. Shards, whose records nobody has counted, take the next record of the stream instead (streaming.py).
"""

import torch

from llava_lite.constants import IGNORE_INDEX

# More cannot be told to the other workers; they then find out by themselves.
MOST_TOLD = 2**20


class LeftOut:
    """Places of records (whole numbers), each with the time from which on it is left out; workers see it change.

    It lies in shared memory, since workers of a loader may live as long as the run. Times only have to grow: epochs in
    training, steps at evaluations. room: places that can be told.
    """

    def __init__(self, room: int):
        # The first row holds how many follow and the time that is now; the others a place and its time.
        self.table = torch.zeros(min(room, MOST_TOLD) + 1, 2, dtype=torch.int64).share_memory_()
        self._known = {}
        self._num_read = 0

    def begin(self, time: int) -> None:
        """Say what time it is, before a loader begins to read."""
        self.table[0, 1] = time

    @property
    def now(self) -> int:
        """The time that was said last."""
        return int(self.table[0, 1])

    def add(self, place: int, since: int) -> None:
        """Leave a record out from a time on; a time before the one that is known replaces it."""
        count = int(self.table[0, 0])
        if count + 1 < len(self.table):
            self.table[count + 1] = torch.tensor([place, since])
            # Last: a worker that counts so many finds them whole.
            self.table[0, 0] = count + 1

    def has(self, place: int, time: int | None = None) -> bool:
        """Tell whether a record is left out, now or at another time."""
        count = int(self.table[0, 0])
        for known, since in self.table[self._num_read + 1 : count + 1].tolist():
            self._known[known] = min(since, self._known.get(known, since))
        self._num_read = count
        since = self._known.get(place)
        return since is not None and since <= (self.now if time is None else time)


def empty_example(name: str, pad_token_id: int | None) -> dict:
    """Return what stands in the place of a record that is left out: one token, of which nothing is learned."""
    ids = torch.tensor([pad_token_id or 0])
    return {"id": name, "input_ids": ids, "labels": torch.full_like(ids, IGNORE_INDEX)}
