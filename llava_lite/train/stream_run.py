"""Let a Trainer take its micro-batches from shards: no sampler, no length, and a resume that reads nothing twice."""

import logging
import math

from torch.utils.data import DataLoader

from llava_lite.anyres import PictureLayout
from llava_lite.data.dataset import ExampleMaker
from llava_lite.data.left_out import LeftOut
from llava_lite.data.shards import find_shards
from llava_lite.data.sources import is_shards
from llava_lite.data.streaming import StreamCollator, StreamDataset
from llava_lite.train.ranks import everyone
from llava_lite.train.run_log import RunLog
from llava_lite.train.skipped import SkipLog

logger = logging.getLogger(__name__)

# Of broken places of shards; a lane that reads one of more finds that it is broken by itself.
MOST_LEFT_OUT = 2**16
LEDGER = "skipped_records-rank{rank:05d}.jsonl"


def refuse_of_shards(data_args, training_args) -> None:
    """Raise ValueError for what cannot be asked of shards, before a model is loaded for it."""
    shards = [path for path in data_args.eval_data_path or () if is_shards(path)]
    if shards:
        raise ValueError(
            f"--eval_data_path {' '.join(shards)}: shards are learned from alone; name files of records to evaluate "
            "on, JSON or JSON lines."
        )
    if not is_shards(data_args.data_path):
        return
    if training_args.max_steps <= 0:
        raise ValueError(
            "--max_steps is needed with shards: how many records they hold is known when they have been read. One "
            "pass over N records is N / (ranks x batch x accumulation) steps."
        )
    for flag, fault in (
        ("ignore_data_skip", "a resume would begin the order anew, and the next one leave records out"),
        ("auto_find_batch_size", "a stream cannot begin anew in the middle of a run with a smaller batch"),
    ):
        if getattr(training_args, flag):
            raise ValueError(f"--{flag} True with shards: {fault}; drop it.")
    strategy, features = training_args.train_sampling_strategy, data_args.feature_cache
    for flag, is_set, instead in (
        # Some recipes say it, whoever has not typed it.
        ("group_by_modality_length True", training_args.group_by_modality_length, "add the flag with False"),
        (f"train_sampling_strategy {strategy}", strategy != "random", "drop it"),
        (f"eval_split {data_args.eval_split}", data_args.eval_split > 0, "name other files with --eval_data_path"),
        (f"feature_cache {features}", features not in ("auto", "off"), "drop it"),
    ):
        if is_set:
            raise ValueError(
                f"--{flag} needs records whose number, order and lengths are known; shards are read as they come: "
                f"{instead}."
            )


def open_stream(model, tokenizer, model_args, data_args, training_args, facts=None) -> StreamDataset:
    """Return the stream of the shards that --data_path names; every rank must find the same."""
    from llava_lite.train.load_data import template_of_run

    tower, args = model.get_vision_tower(), training_args
    maker = ExampleMaker(
        tokenizer,
        None if tower is None else tower.image_processor,
        template_of_run(model_args, data_args, None if facts is None else facts.moment),
        layout=PictureLayout(0) if tower is None else model.config.picture_layout,
        max_length=args.model_max_length,
        mm_use_im_start_end=model.config.mm_use_im_start_end,
        picture_resize=data_args.picture_resize,
        placeholder_as_text=data_args.placeholder_as_text,
    )
    stream = StreamDataset(
        find_shards(data_args.data_path),
        maker,
        args.per_device_train_batch_size,
        num_workers=args.dataloader_num_workers,
        rank=args.process_index,
        num_ranks=args.world_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        window=data_args.shuffle_window,
        pack_tokens=args.packing_tokens if args.packing == "tokens" else None,
        bad_record=data_args.bad_record,
        max_bad_share=data_args.max_bad_share,
        left_out=None if facts is None else LeftOut(MOST_LEFT_OUT),
    )
    if facts is not None:
        facts.logs["train"] = SkipLog(stream.left_out, data_args.bad_record, data_args.max_bad_share)
        facts.logs["train"].begin([], facts.before.get("train", {}).get("later", []))
    if len({tuple(sorted(settings.items(), key=str)) for settings in everyone(stream.settings)}) > 1:
        raise ValueError(f"the ranks see different shards under {data_args.data_path}; share them, or copy them.")
    logger.info("%s: %s", ", ".join(data_args.data_path), stream)
    return stream


class StreamMixin:
    """Trainer overrides for a StreamDataset as train_dataset; with any other they change nothing."""

    @property
    def stream(self) -> StreamDataset | None:
        """The training set, if it is a stream."""
        return self.train_dataset if isinstance(self.train_dataset, StreamDataset) else None

    def get_train_dataloader(self):
        """Return the loader of this rank's own lanes; accelerate would read on one rank and send to the others."""
        if self.stream is None:
            return super().get_train_dataloader()
        args = self.args
        return DataLoader(
            self.stream,
            batch_size=None,
            collate_fn=StreamCollator(self.data_collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a step on the device, having noted how far their lanes are."""
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
        """Write what a lane has left out into the ledger of this rank, once each, and keep it for the other ranks."""
        self.end_of_stream = self.end_of_stream or taken.end
        log = getattr(self.facts, "logs", {}).get("train")
        for line in taken.left_out:
            if log is None or line["place"] not in log.places:
                self.found["train"].append(line)
                if self.stream.bad_record == "skip":
                    self.ledger.write({"step": self.state.global_step + 1, **line})

    @property
    def is_streaming(self) -> bool:
        """Whether a lane may end the run."""
        return self.stream is not None

    def begin_run(self):
        """Begin the ledger of this rank's records that are left out; a run that goes on knows all of it."""
        if self.stream is not None and self.stream.bad_record == "skip":
            self.ledger = RunLog(self.args.output_dir, name=LEDGER.format(rank=self.args.process_index))
            self.ledger.start(math.inf if self.state.global_step else 0)

    def progress_state(self) -> dict:
        """Return what the parents remember, and the place of each lane."""
        more = {} if self.stream is None else {"stream": self.stream.state_dict()}
        return super().progress_state() | more

    def load_progress_state(self, state) -> None:
        """Take up the places."""
        super().load_progress_state(state)
        if self.stream is not None:
            self.stream.load_state_dict(state["stream"])

    def _step_settings(self) -> dict:
        """Return what must be equal for a step to be the same step, the order of the stream included."""
        return super()._step_settings() | ({} if self.stream is None else self.stream.settings)

    def _why_as_many_ranks(self) -> str | None:
        """Return the parents' reason, or that of a stream."""
        dealt = "its shards are dealt to the ranks, and each has read its own to another place"
        return super()._why_as_many_ranks() or (None if self.stream is None else dealt)
