"""Read the records of shards in a seeded order: endless streams that are disjoint and resume at the exact record.

One stream per data-loader worker and rank. Each epoch the shards are shuffled by (seed, epoch) and dealt round-robin
to the streams, so their numbers of shards differ by at most one. If there are fewer shards than streams, a shard is
divided into parts: each of several streams reads every n-th record of it. Within a shard, windows of records are
shuffled. The state of a stream is seven numbers.

A stream that has read its shards of an epoch continues with its shards of the next epoch and waits for no other, so
every rank always has a batch; a run ends after --max_steps, on all ranks at the same step. A stream reads every record
of its shards exactly once an epoch. Streams with unequal numbers of shards drift apart: one with two shards is in its
first epoch while one with a single shard is in its second. Then some records are read twice in as many steps as an
epoch has, and others not at all. None are if the shards are equal and divide evenly among the streams, and few if
there are many times more shards than streams.
"""

import math
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from llava_lite.data.errors import DataError
from llava_lite.data.index.cache import get_key
from llava_lite.data.shards.files import Place, RawRecord, Shard
from llava_lite.data.shards.read import read_shard

# A stream may have no record in an epoch, if a shard is empty or divided among many streams.
MOST_EMPTY_EPOCHS = 100


class StreamState(NamedTuple):
    """The position of a stream: the next record is number `taken` of the shuffled window at (offset, number)."""

    epoch: int = 0
    turn: int = 0  # index of the part of a shard among the stream's parts of this epoch
    offset: int = 0
    number: int = 0
    taken: int = 0
    num_records: int = 0  # read so far, with the skipped ones
    num_bad: int = 0


def _generator(*parts) -> np.random.Generator:
    return np.random.default_rng(int(get_key(*parts), 16))


def get_stream_parts(num_shards: int, num_streams: int, stream: int, seed: int, epoch: int):
    """Return the parts of shards that a stream reads in an epoch: a list of (shard, part, number of parts)."""
    num_parts = math.ceil(num_streams / num_shards)
    order = _generator("shards", seed, epoch).permutation(num_shards * num_parts)[stream::num_streams]
    return [(i // num_parts, i % num_parts, num_parts) for i in order.tolist()]


class RecordStream:
    """The endless records of one stream; `state` is always the position to resume from."""

    def __init__(self, shards: list[Shard], num_streams: int, stream: int, seed: int, window: int, state: StreamState):
        self.shards, self.num_streams, self.stream = shards, num_streams, stream
        self.seed, self.window = seed, max(1, window)
        self.state = state

    def __iter__(self) -> Iterator[tuple[Shard, RawRecord]]:
        """Yield (shard, record); meanwhile `state` is the position after this record."""
        num_empty = 0
        while num_empty < MOST_EMPTY_EPOCHS:
            before = self.state
            parts = get_stream_parts(len(self.shards), self.num_streams, self.stream, self.seed, before.epoch)
            for turn in range(before.turn, len(parts)):
                shard, part, num_parts = parts[turn]
                yield from self._read(shard, part, num_parts)
                self.state = self.state._replace(turn=turn + 1, offset=0, number=0, taken=0)
            # An empty epoch is not an error: its shard may be empty, or was read to the end before a resume.
            num_empty = num_empty + 1 if self.state.num_records == before.num_records else 0
            self.state = self.state._replace(epoch=before.epoch + 1, turn=0)
        names = [self.shards[0].path, *([self.shards[-1].path] if len(self.shards) > 1 else [])]
        raise DataError(
            f"{' to '.join(names)} ({len(self.shards)} shards): no record for a stream in {num_empty} epochs. Are "
            f"they empty, or fewer records than the {self.num_streams} streams (ranks x --dataloader_num_workers)?"
        )

    def _read(self, shard: int, part: int, num_parts: int) -> Iterator[tuple[Shard, RawRecord]]:
        records = read_shard(self.shards[shard], Place(self.state.offset, self.state.number), part, num_parts)
        while members := list(islice(records, self.window)):
            start = self.state
            key = ("window", self.seed, start.epoch, shard, part, num_parts, start.number)
            order = _generator(*key).permutation(len(members))[start.taken :]
            for k in order.tolist():
                taken, count = self.state.taken + 1, self.state.num_records + 1
                self.state = self.state._replace(taken=taken, num_records=count)
                yield self.shards[shard], members[k]
            self.state = self.state._replace(**members[-1].after._asdict(), taken=0)
