"""Train from a stream of shards: no sampler, no length, and a resume that reads no record twice."""

import logging
import math

from torch.utils.data import DataLoader

from llava_lite.data.examples import ExampleMaker
from llava_lite.data.index.sources import is_shards
from llava_lite.data.shards.read import find_shards
from llava_lite.data.shards.stream import StreamCollator, StreamDataset
from llava_lite.data.skipped import LeftOut
from llava_lite.distributed.ranks import everyone
from llava_lite.train.inputs.skipped import SkipLog
from llava_lite.train.monitor.run_log import RunLog

logger = logging.getLogger(__name__)

# Corrupt positions of shards that all workers know of; further ones each worker finds by itself.
MOST_LEFT_OUT = 2**16
SKIPPED_LOG = "skipped_records-rank{rank:05d}.jsonl"


def check_shard_flags(data_args, training_args) -> None:
    """Raise ValueError for flags that shards do not support, before a model is loaded."""
    shards = [path for path in data_args.eval_data_path or () if is_shards(path)]
    if shards:
        raise ValueError(
            f"--eval_data_path {' '.join(shards)}: shards are for training only; name files of records to evaluate "
            "on, JSON or JSON lines."
        )
    if not is_shards(data_args.data_path):
        return
    if training_args.max_steps <= 0:
        raise ValueError(
            "--max_steps is needed with shards: their records are counted only by reading them. One pass over N "
            "records is N / (ranks x batch x accumulation) steps."
        )
    for flag, fault in (
        ("ignore_data_skip", "a resume would start the order again, and the next one would skip records"),
        ("auto_find_batch_size", "a stream cannot start again in the middle of a run with a smaller batch"),
    ):
        if getattr(training_args, flag):
            raise ValueError(f"--{flag} True with shards: {fault}; drop it.")
    strategy, features = training_args.train_sampling_strategy, data_args.feature_cache
    for flag, is_set, instead in (
        # Set by some recipes, without the user having typed it.
        ("group_by_modality_length True", training_args.group_by_modality_length, "add the flag with False"),
        (f"train_sampling_strategy {strategy}", strategy != "random", "drop it"),
        (f"eval_split {data_args.eval_split}", data_args.eval_split > 0, "name other files with --eval_data_path"),
        (f"feature_cache {features}", features not in ("auto", "off"), "drop it"),
    ):
        if is_set:
            raise ValueError(
                f"--{flag} needs records whose number, order and lengths are known; shards are read as a stream: "
                f"{instead}."
            )


def open_stream(tokenizer, settings, data_args, training_args, facts) -> StreamDataset:
    """Return the stream of the shards that --data_path names; every rank must find the same.

    settings: see example_settings.
    """
    args = training_args
    stream = StreamDataset(
        find_shards(data_args.data_path),
        ExampleMaker(tokenizer, **settings),
        args.per_device_train_batch_size,
        num_workers=args.dataloader_num_workers,
        rank=args.process_index,
        num_ranks=args.world_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        window=data_args.shuffle_window,
        pack_tokens=args.packing_tokens if args.packing == "tokens" else None,
        bad_record=data_args.bad_record,
        max_bad_fraction=data_args.max_bad_fraction,
        left_out=LeftOut(MOST_LEFT_OUT),
    )
    log = facts.logs["train"] = SkipLog(stream.left_out, data_args.bad_record, data_args.max_bad_fraction)
    log.begin([], facts.before.get("train", {}).get("later", []))
    if len({tuple(sorted(settings.items(), key=str)) for settings in everyone(stream.settings)}) > 1:
        raise ValueError(f"the ranks see different shards under {data_args.data_path}; share them, or copy them.")
    logger.info("%s: %s", ", ".join(data_args.data_path), stream)
    return stream


class StreamLoader(DataLoader):
    """A DataLoader whose iterator can be closed, which ends its workers, as accelerate's can."""

    def __iter__(self):
        yield from super().__iter__()


class StreamMixin:
    """Trainer overrides for a StreamDataset as train_dataset; with any other they change nothing."""

    @property
    def stream(self) -> StreamDataset | None:
        """The training set, if it is a stream."""
        return self.train_dataset if isinstance(self.train_dataset, StreamDataset) else None

    def get_train_dataloader(self):
        """Return the loader of this rank's own streams; accelerate would read on one rank and send to the others."""
        if self.stream is None:
            return super().get_train_dataloader()
        args = self.args
        return StreamLoader(
            self.stream,
            batch_size=None,
            collate_fn=StreamCollator(self.data_collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a step on the device, and note the position of each stream."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.stream is None:
            return batches, num_items
        from accelerate.utils import send_to_device

        for batch in batches:
            taken = batch.pop("stream")
            self.stream.note(taken)
            self._note_left_out(taken)
        return [send_to_device(batch, device, non_blocking=True) for batch in batches], num_items

    def _note_left_out(self, taken) -> None:
        """Write each record that a stream left out to the log of this rank, once, and keep it for the other ranks."""
        self.end_of_stream = self.end_of_stream or taken.end
        known = self.logs["train"].places if "train" in self.logs else ()
        for line in taken.left_out:
            if line["place"] not in known:
                self.found["train"].append(line)
                if self.stream.bad_record == "skip":
                    self.skipped_log.write({"step": self.state.global_step + 1, **line})

    def begin_run(self):
        """Start the skipped-records log of this rank; a resumed run keeps all of its lines."""
        if self.stream is not None and self.stream.bad_record == "skip":
            self.skipped_log = RunLog(self.args.output_dir, name=SKIPPED_LOG.format(rank=self.args.process_index))
            self.skipped_log.start(math.inf if self.state.global_step else 0)

    def progress_state(self) -> dict:
        """Return the state of the parents, and the position of each stream."""
        more = {} if self.stream is None else {"stream": self.stream.state_dict()}
        return super().progress_state() | more

    def load_progress_state(self, state) -> None:
        """Restore the positions."""
        super().load_progress_state(state)
        if self.stream is not None:
            self.stream.load_state_dict(state["stream"])

    def step_settings(self) -> dict:
        """Return what must be equal for a step to be the same step, the order of the stream included."""
        return super().step_settings() | ({} if self.stream is None else self.stream.settings)

    def why_as_many_ranks(self) -> str | None:
        """Return the parents' reason, or that of a stream."""
        dealt = "its shards are dealt to the ranks, and each has read its own to a different position"
        return super().why_as_many_ranks() or (None if self.stream is None else dealt)
