"""Turn shards of any number into an endless stream of micro-batches: seeded order, disjoint lanes, exact resume.

A lane is one worker of the data loader on one rank; its share of the shards of every epoch, in an order drawn from
seed and epoch, is that of any other lane or one shard more. Where there are fewer shards than lanes, several lanes
read one shard and each takes every n-th record. Within a shard, windows of records are shuffled. What a lane must
remember to go on is five numbers: nothing grows with the data but the list of shards.

The end: a lane that has read its share of an epoch goes on with its share of the next and waits for nobody, so every
rank has a batch whenever it asks, and a run ends with --max_steps, on all ranks at the same step. Every record is read
exactly once an epoch of its lane. Lanes whose shares are not equal drift apart: one with two shards is in its first
epoch while one with a single shard is in its second, so that as many steps as an epoch has leave some records unread
and read others twice; none do where the lanes divide equal shards, few where shards are many times the lanes.
"""

import math
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from llava_lite.data.cache import key_of
from llava_lite.data.dataset import ExampleMaker
from llava_lite.data.left_out import LeftOut
from llava_lite.data.picture_files import open_image
from llava_lite.data.scan import DataError
from llava_lite.data.shard_files import Place, RawRecord, Shard
from llava_lite.data.shards import parse_shard_record, read_shard
from llava_lite.pictures import PictureError

# The share of bad records is judged from here on: the first record of a run may be a bad one.
LEAST_JUDGED = 1000
# A lane's share of an epoch may hold no record where a shard is empty or there are few; the next is another share.
MOST_EMPTY_EPOCHS = 100
# A record's place is its shard's number in front of its own, in so many bits.
RECORD_BITS = 40


class LaneState(NamedTuple):
    """Where a lane stands: the next record is the `taken`-th of the window that begins at (offset, number)."""

    epoch: int = 0
    turn: int = 0  # which of its parts of shards in this epoch
    offset: int = 0
    number: int = 0
    taken: int = 0
    num_records: int = 0  # read so far, those left out too
    num_bad: int = 0


class StreamBatch(NamedTuple):
    """Examples of one micro-batch, the lane they come from, its state after them, and what it left out."""

    examples: list[dict]
    lane: int = 0  # of the rank
    state: LaneState = LaneState()
    left_out: tuple[dict, ...] = ()
    end: DataError | None = None  # why the lane does not go on


def _generator(*words) -> np.random.Generator:
    return np.random.default_rng(int(key_of(*words), 16))


def parts_of_lane(num_shards: int, num_lanes: int, lane: int, seed: int, epoch: int) -> list[tuple[int, int, int]]:
    """Return a lane's share of an epoch, disjoint from that of the others: (shard, part, parts of a shard) each."""
    num_parts = math.ceil(num_lanes / num_shards)
    order = _generator("shards", seed, epoch).permutation(num_shards * num_parts)[lane::num_lanes]
    return [(i // num_parts, i % num_parts, num_parts) for i in order.tolist()]


class Lane:
    """The endless records of one lane; `state` says at any time how to go on from here."""

    def __init__(self, shards: list[Shard], num_lanes: int, lane: int, seed: int, window: int, state: LaneState):
        self.shards, self.num_lanes, self.lane = shards, num_lanes, lane
        self.seed, self.window = seed, max(1, window)
        self.state = state

    def __iter__(self) -> Iterator[tuple[Shard, RawRecord]]:
        """Yield a record and its shard; `state` is that after it."""
        num_empty = 0
        while num_empty < MOST_EMPTY_EPOCHS:
            before = self.state
            parts = parts_of_lane(len(self.shards), self.num_lanes, self.lane, self.seed, before.epoch)
            for turn in range(before.turn, len(parts)):
                shard, part, num_parts = parts[turn]
                yield from self._shard(shard, part, num_parts)
                self.state = self.state._replace(turn=turn + 1, offset=0, number=0, taken=0)
            # An empty epoch is no fault: its share may be an empty shard, or read to the end before a resume.
            num_empty = num_empty + 1 if self.state.num_records == before.num_records else 0
            self.state = self.state._replace(epoch=before.epoch + 1, turn=0)
        names = [self.shards[0].path, *([self.shards[-1].path] if len(self.shards) > 1 else [])]
        raise DataError(
            f"{' to '.join(names)} ({len(self.shards)} shards): no record for a lane in {num_empty} epochs. Are they "
            f"empty, or fewer records than the {self.num_lanes} lanes (ranks x --dataloader_num_workers)?"
        )

    def _shard(self, shard: int, part: int, num_parts: int) -> Iterator[tuple[Shard, RawRecord]]:
        records = read_shard(self.shards[shard], Place(self.state.offset, self.state.number), part, num_parts)
        while members := list(islice(records, self.window)):
            start = self.state
            words = ("window", self.seed, start.epoch, shard, part, num_parts, start.number)
            order = _generator(*words).permutation(len(members))[start.taken :]
            for k in order.tolist():
                taken, count = self.state.taken + 1, self.state.num_records + 1
                self.state = self.state._replace(taken=taken, num_records=count)
                yield self.shards[shard], members[k]
            self.state = self.state._replace(**members[-1].after._asdict(), taken=0)


class StreamDataset(IterableDataset):
    """Micro-batches of examples from shards, for a DataLoader with batch_size=None and StreamCollator.

    num_workers: of the loader, 0 for none; seed: of the order. window: records of a shard that are shuffled together
    and held in memory meanwhile. pack_tokens: a micro-batch is as many examples as have room in so many tokens, in the
    order of the stream, in place of `batch_size`. bad_record: `raise`, or `skip`, which leaves out at most
    `max_bad_share` of them; what is behind a broken place of a shard nobody can count, and it counts as one. left_out:
    what a run leaves out, on all lanes; a lane that may not go on then ends with a batch that says why, and no error.
    """

    def __init__(
        self,
        shards: list[Shard],
        maker: ExampleMaker,
        batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        seed: int = 0,
        window: int = 512,
        pack_tokens: int | None = None,
        bad_record: str = "raise",
        max_bad_share: float = 0.01,
        left_out: LeftOut | None = None,
    ):
        self.left_out, self.shard_numbers = left_out, {shard.path: k for k, shard in enumerate(shards)}
        self.shards, self.maker, self.batch_size = shards, maker, batch_size
        self.lanes_a_rank, self.rank, self.num_ranks = max(1, num_workers), rank, num_ranks
        self.seed, self.window, self.pack_tokens = seed, window, pack_tokens
        self.bad_record, self.max_bad_share = bad_record, max_bad_share
        self.num_consumed, self.states = 0, [LaneState()] * self.lanes_a_rank

    def __str__(self):
        """Say on one line what is read, and how."""
        num_lanes = self.num_ranks * self.lanes_a_rank
        shared = math.ceil(num_lanes / len(self.shards))
        each = f", each read by {shared} lanes" if shared > 1 else ""
        if len(self.shards) * shared % num_lanes:
            each += ", unequal shares: some lanes begin their next epoch earlier"
        gigabytes = sum(shard.num_bytes for shard in self.shards) / 1e9
        return f"{len(self.shards):,} shards of {gigabytes:,.1f} GB in all, {num_lanes} lanes{each}"

    @property
    def settings(self) -> dict:
        """What must be equal for the order to be the same."""
        digest = key_of(*((shard.name, shard.num_bytes) for shard in self.shards))
        return {
            "shards": f"{len(self.shards)} ({digest})",
            "lanes a rank (--dataloader_num_workers)": self.lanes_a_rank,
        } | {
            "shuffle_window": self.window,
            "tokens of a pack": self.pack_tokens,
        }

    @property
    def sources(self) -> list[tuple[str, int]]:
        """What was read and how many records were learned from on all ranks, as many as on this one; for the card."""
        num_used = sum(state.num_records - state.num_bad for state in self.states)
        names = [self.shards[0].name, *([self.shards[-1].name] if len(self.shards) > 1 else [])]
        return [(" to ".join(names), num_used * self.num_ranks)]

    @property
    def layout(self):
        """How a picture becomes features."""
        return self.maker.layout

    # Going on.

    def note(self, batch: StreamBatch) -> None:
        """Remember that the run has taken this micro-batch."""
        self.num_consumed += 1
        self.states[batch.lane] = batch.state

    def state_dict(self) -> dict:
        """Return what this rank needs to go on behind the last micro-batch that was noted."""
        return {"num_consumed": self.num_consumed, "lanes": [list(state) for state in self.states]}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned; a loader then passes over so many empty micro-batches first."""
        self.num_consumed, self.states = state["num_consumed"], [LaneState(*lane) for lane in state["lanes"]]

    # Reading.

    def __iter__(self) -> Iterator[StreamBatch]:
        """Yield the micro-batches of this worker's lane: empty for those that the run has taken before."""
        info = get_worker_info()
        mine, num_workers = (info.id, info.num_workers) if info else (0, 1)
        assert num_workers == self.lanes_a_rank
        # A loader asks its workers in turn, from the first on, and its first batches are those that a resume skips.
        yield from [StreamBatch([])] * len(range(mine, self.num_consumed, num_workers))
        lane = Lane(
            self.shards,
            self.num_ranks * self.lanes_a_rank,
            self.rank * self.lanes_a_rank + mine,
            self.seed,
            self.window,
            self.states[mine],
        )
        yield from self._batches(lane, mine)

    def _batches(self, lane: Lane, number: int) -> Iterator[StreamBatch]:
        left_out, examples, state = [], [], lane.state
        for shard, raw in lane:
            place = self.shard_numbers[shard.path] << RECORD_BITS | raw.number
            try:
                is_known = self.left_out is not None and self.left_out.has(place, lane.state.epoch)
                if is_known:
                    raise DataError(f"{shard.name}[{raw.number}] was left out before.")
                example = self._example(shard, raw)
            except DataError as error:
                lane.state = lane.state._replace(num_bad=lane.state.num_bad + 1)
                line = {"shard": shard.path, "number": raw.number, "key": raw.key, "reason": str(error)}
                left_out += [] if is_known else [line | {"place": place, "since": lane.state.epoch}]
                end = None if is_known else self._judge(lane.state, error)
                if end is not None:
                    yield from self._last(StreamBatch(examples, number, state, tuple(left_out), end), line)
            else:
                if self._is_full(examples, example):
                    # The state before this example: a run that resumes here reads it again.
                    yield StreamBatch(examples, number, state, tuple(left_out))
                    left_out, examples = [], []
                examples.append(example)
            state = lane.state
            if self.pack_tokens is None and len(examples) == self.batch_size:
                yield StreamBatch(examples, number, state, tuple(left_out))
                left_out, examples = [], []

    def _last(self, batch: StreamBatch, line: dict) -> Iterator[StreamBatch]:
        """Yield the batch with which a lane ends, by which its run tells all ranks why, and empty ones until it has.

        Without a run, raise the reason.
        """
        if self.left_out is None:
            raise batch.end
        empty = [self.maker.empty(f"{line['shard']}[{line['number']}]")]
        yield batch if batch.examples else batch._replace(examples=empty)
        while True:
            yield batch._replace(examples=empty, left_out=())

    def _is_full(self, examples: list[dict], example: dict) -> bool:
        if self.pack_tokens is None or not examples:
            return False
        return sum(len(one["input_ids"]) for one in (*examples, example)) > self.pack_tokens

    def _example(self, shard: Shard, raw: RawRecord) -> dict:
        record, files = parse_shard_record(shard, raw)
        try:
            pictures = [open_image(data) for data in files]
        except PictureError as error:
            raise DataError(f"{record.name}: cannot use its picture: {error.reason}") from error
        if pictures and self.maker.image_processor is None:
            raise ValueError(f"{record.name} has a picture but there is no tower; name one with --vision_tower.")
        example = self.maker.example(record, pictures)
        length = len(example["input_ids"])
        if self.pack_tokens is not None and length > self.pack_tokens:
            raise DataError(f"{record.name} has {length:,} tokens, a pack {self.pack_tokens:,}: --packing_tokens.")
        return example

    def _judge(self, state: LaneState, error: DataError) -> DataError | None:
        """Return why a lane may not go on behind a record that cannot be used, None if it may."""
        if self.bad_record == "raise":
            end = "" if str(error).endswith("?") else "."
            return DataError(
                f"{str(error).rstrip('.')}{end} Mend it, or leave such records out with --bad_record skip."
            )
        # No share is so large that a lane may go on without end and find nothing.
        none_good = state.num_bad == state.num_records >= LEAST_JUDGED
        if none_good or state.num_bad > self.max_bad_share * max(state.num_records, LEAST_JUDGED):
            share = f"{state.num_bad:,} of {state.num_records:,} records of a lane cannot be used, the last: {error}"
            return DataError(
                f"{share.rstrip('.')}. --bad_record skip leaves out at most {self.max_bad_share:.2%}, and never all."
            )
        return None


class StreamCollator:
    """A StreamBatch -> the batch that `collator` makes of its examples, with the rest of it under "stream"."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, batch: StreamBatch) -> dict:
        """Return the batch; an empty one for what a resume passes over."""
        if not batch.examples:
            return {}
        return self.collator(batch.examples) | {"stream": batch._replace(examples=[])}
