"""Save a running Trainer as checkpoint-N, complete or absent, and resume from it bit for bit."""

import logging
import os
from contextlib import nullcontext
from pathlib import Path

from safetensors.torch import load_file

from llava_lite.train.saving import manifest as paper
from llava_lite.train.saving import other_ranks as other
from llava_lite.train.saving.engine import load_engine
from llava_lite.train.saving.interrupt import EXIT_RESUMABLE, ProgressCallback
from llava_lite.train.saving.resume import find_checkpoint
from llava_lite.train.saving.same_run import SameRunMixin, get_num_ranks
from llava_lite.train.saving.trained_weights import TRAINED, check_frozen, frozen_prints, load_trained
from llava_lite.train.saving.writer import CheckpointWriter

logger = logging.getLogger(__name__)


class CheckpointMixin(SameRunMixin):
    """Trainer overrides: `class LLaVATrainer(CheckpointMixin, Trainer)`.

    checkpoint-N holds what trains, the optimizer, the scheduler, the random state and the unlogged loss of every rank,
    and manifest.json, written last. One process, DDP and DeepSpeed; a subclass with counters of its own adds them in
    `progress_state` and takes them back in `load_progress_state`. opening: writes into a directory, with the run's
    arguments, what opens a checkpoint as a model; see final.write_opening.
    """

    opening = None
    # See SkipMixin, which has records to agree on at the end of a step.
    facts, has_news = None, False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            raise ValueError("--fsdp: checkpoints of FSDP runs are not written here; use --deepspeed zero3.")
        if self.args.enable_jit_checkpoint:
            raise ValueError("--enable_jit_checkpoint: SIGTERM always saves a full checkpoint here; drop the flag.")
        self.progress = ProgressCallback(self)
        self.add_callback(self.progress)
        self.checkpoint_writer = CheckpointWriter(self)

    # A subclass extends these.

    def progress_state(self) -> dict:
        """Return what this rank must remember between two logged steps: tensors, numbers, strings, lists, tables."""
        return {}

    def load_progress_state(self, state: dict) -> None:
        """Take back what `progress_state` returned on this rank."""

    def begin_epoch(self, epoch: int) -> None:
        """Prepare for an epoch, before its first record is read."""

    def push_checkpoint(self, path: str) -> None:
        """Upload a checkpoint, if the run does."""

    def has_bad_update(self) -> bool:
        """Tell whether weights or optimizer state of this rank are not finite after a step."""
        return False

    def stopped_clock(self):
        """Return a context whose time does not count as training."""
        return nullcontext()

    # Reading.

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train; a checkpoint is verified and compared with this run before anything is loaded."""
        path = find_checkpoint(self.args.output_dir, resume_from_checkpoint or False, self.args.should_save)
        self.check_checkpoint(path)
        with self.progress.workers_ended():
            return super().train(resume_from_checkpoint=path, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a step; none for a run that has all its steps, which would take one more."""
        if self.progress.is_finished:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def set_sampler_epoch(self, train_dataloader, epoch: int) -> None:
        """Set the epoch of the innermost sampler; the loader that skips batches after a resume hides it on 2 ranks."""
        sampler = getattr(train_dataloader, "batch_sampler", None)
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)

    # Trainer's own demands the weights of the complete model, and a checkpoint holds what trains.
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Copy the trained weights into the model; the frozen ones are those of the base model."""
        path = os.path.join(resume_from_checkpoint, TRAINED)
        load_trained(self.model, load_file(path), path)

    # Trainer's own loads an engine strictly, which demands the frozen weights too.
    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Wrap the model, then load the engine's state and the progress of the run."""
        path, in_engine = resume_from_checkpoint, self.is_deepspeed_enabled
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None if in_engine else path)
        self.progress.frozen = frozen_prints(self.model)
        if path is not None:
            if in_engine:
                self.load_engine(path)
                self._load_optimizer_and_scheduler(path)
            self.load_progress(path)
        return prepared

    # Trainer's own looks for a complete model, and loads an engine strictly.
    def _load_best_model(self) -> None:
        """Load the trained weights of the best checkpoint."""
        path = self.state.best_model_checkpoint
        paper.verify(path)
        if self.is_deepspeed_enabled:
            self.load_engine(path)
        else:
            self._load_from_checkpoint(path)

    def load_engine(self, path: str) -> None:
        """Load the engine's state, whichever number of ranks saved it."""
        is_converter = self.args.process_index == 0
        load_engine(self.model_wrapped, path, get_num_ranks(path), self.args.output_dir, is_converter)

    def load_progress(self, path: str) -> None:
        """Read what this rank remembered, or its part of what other ranks did; compare the frozen weights."""
        saved_by, ranks = get_num_ranks(path), self.args.world_size
        if saved_by == ranks:
            self.progress.load(os.path.join(path, f"progress_{self.args.process_index}.pt"))
            check_frozen(self.progress.frozen, self.progress.saved["frozen"], path)
            return
        self.progress.saved = other.get_shard(other.read_progress(path, saved_by), ranks)
        self.progress.saved_by_others = path, saved_by
        # As the first of those ranks saw them: under ZeRO-3 that is a shard.
        check_frozen(frozen_prints(self.model, saved_by), self.progress.saved["frozen"], path)

    # Writing.

    def log(self, logs, start_time=None):
        """Write a line of the log; the last one reports the time of the complete run."""
        self.progress.count_earlier_time(logs)
        super().log(logs, start_time)

    # Trainer's own writes in place: a save that is cut off leaves half a checkpoint, under the name of a complete one.
    def _save_checkpoint(self, model, trial):
        """Write checkpoint-N; after SIGTERM end the process, with the code that says so."""
        with self.stopped_clock():
            final = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            if self.progress.last_saved != final:
                self.store_flos()
                if self.state.best_global_step:
                    best = final.with_name(f"checkpoint-{self.state.best_global_step}")
                    self.state.best_model_checkpoint = str(best) if best == final or best.is_dir() else None
                self.checkpoint_writer.write(final)
                self.progress.last_saved = final
                if self.args.push_to_hub:
                    self.push_checkpoint(str(final))
            if self.progress.stop_requested:
                logger.warning("SIGTERM: %s is saved, leaving with code %d.", final, EXIT_RESUMABLE)
                raise SystemExit(EXIT_RESUMABLE)
