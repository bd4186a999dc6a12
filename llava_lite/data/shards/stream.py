"""Turn shards into an endless stream of micro-batches for training; order.py has the order of their records."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from llava_lite.data.errors import DataError
from llava_lite.data.examples import ExampleMaker
from llava_lite.data.image_files import open_record_image
from llava_lite.data.index.cache import get_key
from llava_lite.data.reading import ReadingNotes
from llava_lite.data.shards.files import RawRecord, Shard
from llava_lite.data.shards.order import RecordStream, StreamState
from llava_lite.data.shards.read import parse_shard_record
from llava_lite.data.skipped import LeftOut
from llava_lite.media.image import ImageError

# The fraction of bad records is judged as if at least so many were read: the first record may be a bad one.
LEAST_JUDGED = 1000
# The number of a record over all shards is its shard's number, then its own in this many bits.
RECORD_BITS = 40


class StreamBatch(NamedTuple):
    """The examples of a micro-batch, its stream, the stream's state after them, and the records that it left out."""

    examples: list[dict]
    stream: int = 0  # of this rank
    state: StreamState = StreamState()
    left_out: tuple[dict, ...] = ()
    end: DataError | None = None  # why the stream ends here


class StreamDataset(IterableDataset):
    """Micro-batches of examples from shards, for a DataLoader with batch_size=None and StreamCollator.

    num_workers: of the loader, 0 for none. seed: of the order. window: records of a shard that are shuffled together
    and kept in memory meanwhile. pack_tokens: instead of `batch_size`, a micro-batch has as many examples, in the
    order of the stream, as fit in this number of tokens. bad_record: `raise`, or `skip`, which leaves out at most
    `max_bad_fraction` of the records. Records after a corrupt position cannot be counted; together they count as one
    bad record. left_out: the records that the run leaves out, on all streams; with it, a stream that may not continue
    ends with a batch that has the reason in `end`, and raises no error. reading: where to note which record is read.
    """

    reading: ReadingNotes | None = None

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
        max_bad_fraction: float = 0.01,
        left_out: LeftOut | None = None,
    ):
        self.left_out, self.shard_numbers = left_out, {shard.path: k for k, shard in enumerate(shards)}
        self.shards, self.maker, self.batch_size = shards, maker, batch_size
        self.streams_a_rank, self.rank, self.num_ranks = max(1, num_workers), rank, num_ranks
        self.seed, self.window, self.pack_tokens = seed, window, pack_tokens
        self.bad_record, self.max_bad_fraction = bad_record, max_bad_fraction
        self.num_consumed, self.states = 0, [StreamState()] * self.streams_a_rank

    def __str__(self):
        """Describe on one line what is read, and how."""
        num_streams = self.num_ranks * self.streams_a_rank
        num_parts = math.ceil(num_streams / len(self.shards))
        each = f", each shard read by {num_parts} of them" if num_parts > 1 else ""
        if len(self.shards) * num_parts % num_streams:
            each += ", unequal numbers of shards: some streams begin their next epoch earlier"
        gigabytes = sum(shard.num_bytes for shard in self.shards) / 1e9
        return f"{len(self.shards):,} shards of {gigabytes:,.1f} GB in all, {num_streams} streams{each}"

    @property
    def settings(self) -> dict:
        """The settings that decide the order; a resumed run must have the same."""
        digest = get_key(*((shard.name, shard.num_bytes) for shard in self.shards))
        return {
            "shards": f"{len(self.shards)} ({digest})",
            "streams a rank (--dataloader_num_workers)": self.streams_a_rank,
            "shuffle_window": self.window,
            "tokens of a pack": self.pack_tokens,
        }

    @property
    def sources(self) -> list[tuple[str, int]]:
        """The names of the shards and an estimate of the records trained on; for the model card."""
        num_used = sum(state.num_records - state.num_bad for state in self.states)
        names = [self.shards[0].name, *([self.shards[-1].name] if len(self.shards) > 1 else [])]
        return [(" to ".join(names), num_used * self.num_ranks)]

    @property
    def layout(self):
        """How an image becomes features."""
        return self.maker.layout

    # Resuming.

    def note(self, batch: StreamBatch) -> None:
        """Remember that the run has used this micro-batch."""
        self.num_consumed += 1
        self.states[batch.stream] = batch.state

    def state_dict(self) -> dict:
        """Return the state from which this rank resumes after the last noted micro-batch."""
        return {"num_consumed": self.num_consumed, "streams": [list(state) for state in self.states]}

    def load_state_dict(self, state: dict) -> None:
        """Resume from the result of `state_dict`; the loader then first yields `num_consumed` empty micro-batches."""
        # Checkpoints of version 0.1 call them lanes.
        states = state["streams"] if "streams" in state else state["lanes"]
        self.num_consumed, self.states = state["num_consumed"], [StreamState(*numbers) for numbers in states]

    # Reading.

    def __iter__(self) -> Iterator[StreamBatch]:
        """Yield the micro-batches of this worker's stream; those that the run used before a resume are empty."""
        info = get_worker_info()
        mine, num_workers = (info.id, info.num_workers) if info else (0, 1)
        assert num_workers == self.streams_a_rank
        # A loader asks its workers in turn, beginning with the first, and skips its first batches after a resume.
        yield from [StreamBatch([])] * len(range(mine, self.num_consumed, num_workers))
        records = RecordStream(
            self.shards,
            self.num_ranks * self.streams_a_rank,
            self.rank * self.streams_a_rank + mine,
            self.seed,
            self.window,
            self.states[mine],
        )
        for batch in self._batches(records, mine):
            self._note(None)
            yield batch
            self._note("the next record of its shards")

    def _note(self, text: str | None) -> None:
        """Note what this worker reads, None for nothing."""
        if self.reading is not None:
            self.reading.end() if text is None else self.reading.begin(text)

    def _batches(self, records: RecordStream, stream: int) -> Iterator[StreamBatch]:
        left_out, examples, state = [], [], records.state
        for shard, raw in records:
            place = self.shard_numbers[shard.path] << RECORD_BITS | raw.number
            self._note(f"{shard.name}[{raw.number}] ({raw.key})")
            try:
                is_known = self.left_out is not None and self.left_out.has(place, records.state.epoch)
                if is_known:
                    raise DataError(f"{shard.name}[{raw.number}] was left out before.")
                example = self._example(shard, raw, place, records.state.epoch)
            except DataError as error:
                records.state = records.state._replace(num_bad=records.state.num_bad + 1)
                line = {"shard": shard.path, "number": raw.number, "key": raw.key, "reason": str(error)}
                left_out += [] if is_known else [line | {"place": place, "since": records.state.epoch}]
                end = None if is_known else self._judge(records.state, error)
                if end is not None:
                    yield from self._last(StreamBatch(examples, stream, state, tuple(left_out), end), line)
            else:
                if self._is_full(examples, example):
                    # The state before this example: a run that resumes here reads it again.
                    yield StreamBatch(examples, stream, state, tuple(left_out))
                    left_out, examples = [], []
                examples.append(example)
            state = records.state
            self._note(f"the record after {shard.name}[{raw.number}]")
            if self.pack_tokens is None and len(examples) == self.batch_size:
                yield StreamBatch(examples, stream, state, tuple(left_out))
                left_out, examples = [], []

    def _last(self, batch: StreamBatch, line: dict) -> Iterator[StreamBatch]:
        """Yield the last batch of a stream, by which the run reports the reason on all ranks, then empty ones.

        Outside a run, raise the reason.
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

    def _example(self, shard: Shard, raw: RawRecord, place: int, epoch: int) -> dict:
        record, files = parse_shard_record(shard, raw)
        try:
            images = [open_record_image(data) for data in files]
        except ImageError as error:
            raise DataError(f"{record.name}: cannot use its image: {error.reason}") from error
        if images and self.maker.image_processor is None:
            raise ValueError(f"{record.name} has an image but there is no vision tower; name one with --vision_tower.")
        example = self.maker.example(record, images, place, epoch)
        length = len(example["input_ids"])
        if self.pack_tokens is not None and length > self.pack_tokens:
            raise DataError(
                f"{record.name} has {length:,} tokens but a pack holds {self.pack_tokens:,}. Raise --packing_tokens."
            )
        return example

    def _judge(self, state: StreamState, error: DataError) -> DataError | None:
        """Return why a stream may not continue after a bad record, None if it may."""
        if self.bad_record == "raise":
            end = "" if str(error).endswith("?") else "."
            return DataError(
                f"{str(error).rstrip('.')}{end} Mend it, or leave such records out with --bad_record skip."
            )
        # Even with a fraction of 1 a stream may not search forever and find no good record.
        none_good = state.num_bad == state.num_records >= LEAST_JUDGED
        if none_good or state.num_bad > self.max_bad_fraction * max(state.num_records, LEAST_JUDGED):
            found = f"{state.num_bad:,} of {state.num_records:,} records of a stream cannot be used, the last: {error}"
            return DataError(
                f"{found.rstrip('.')}. --bad_record skip leaves out at most {self.max_bad_fraction:.2%}, never all."
            )
        return None


class StreamCollator:
    """A StreamBatch -> the batch of `collator` for its examples, with the other fields under "stream"."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, batch: StreamBatch) -> dict:
        """Return the batch; {} for one that a resume skips."""
        if not batch.examples:
            return {}
        return self.collator(batch.examples) | {"stream": batch._replace(examples=[])}
