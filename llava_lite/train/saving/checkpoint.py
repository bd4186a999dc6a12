"""Save a running Trainer as checkpoint-N, complete or absent, and resume from it bit for bit."""

import logging
import os
import time
from contextlib import nullcontext
from pathlib import Path

from safetensors.torch import load_file

from llava_lite.train.saving import manifest as paper
from llava_lite.train.saving import other_ranks as other
from llava_lite.train.saving.due import DoDueWork, DueWork, restore_callbacks, undone_on
from llava_lite.train.saving.engine import load_engine
from llava_lite.train.saving.interrupt import EXIT_RESUMABLE, LOSS, EvaluationStopped, ProgressCallback
from llava_lite.train.saving.lock import output_held
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
        self.due = DueWork(self)
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
        self._ignore_keys_for_eval = kwargs.get("ignore_keys_for_eval")
        self.pop_callback(DoDueWork)
        self.add_callback(DoDueWork(self))
        with output_held(self.args):
            path = find_checkpoint(self.args.output_dir, resume_from_checkpoint or False, self.args.should_save)
            self.check_checkpoint(path)
            with self.progress.workers_ended():
                result = super().train(resume_from_checkpoint=path, **kwargs)
            if path is not None:
                # A run that was killed between its last save and the deletion has none left that would delete.
                self.checkpoint_writer.prune(Path(self.args.output_dir), [Path(path)])
            return result

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a step; none for a run that has all its steps, which would take one more."""
        if self.progress.is_finished:
            return [], None
        self.progress.batches = epoch_iterator
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
            self.due.saved = self.progress.saved.get("due")
            restore_callbacks(self)
        self.due.path = path
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
        """Load the engine's state, whichever number of ranks saved it, under whichever stage of ZeRO."""
        saved = paper.read_manifest(path)["steps"]
        now = (self.args.world_size, self.get_zero_stage())
        is_as_saved = (saved[other.RANKS], saved[other.ZERO_STAGE]) == now
        load_engine(self.model_wrapped, path, is_as_saved, self.args.output_dir, self.args.process_index == 0)

    def load_progress(self, path: str) -> None:
        """Read what this rank remembered, or its part of what other ranks did; compare the frozen weights."""
        saved_by, ranks = get_num_ranks(path), self.args.world_size
        saved_stage = paper.read_manifest(path)["steps"][other.ZERO_STAGE]
        if saved_by == ranks:
            self.progress.load(os.path.join(path, f"progress_{self.args.process_index}.pt"))
        else:
            self.progress.saved = other.get_shard(other.read_progress(path, saved_by), ranks)
            self.progress.saved_by_others = path, saved_by
        if (saved_by, saved_stage) == (ranks, self.get_zero_stage()):
            check_frozen(self.progress.frozen, self.progress.saved["frozen"], path)
            return
        # As the first of those ranks saw them: under ZeRO-3 that is a shard.
        prints = frozen_prints(self.model, saved_by if saved_stage == 3 else 1)
        check_frozen(prints, other.read_progress(path, 1)[0]["frozen"], path)

    # After a step.

    # No callback comes before the log of a step, or knows the figures in it.
    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, *args, **kwargs):
        """Log, evaluate and save what is due; after a signal save in any case, before an evaluation."""
        self.due.note(self.control, grad_norm, kwargs.get("learning_rate"))
        self.control.should_save |= self.progress.stop_requested is not None
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kwargs)

    # What an evaluation returns is compared with the best one: one that is interrupted must not return.
    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        """Evaluate; if a signal has come or comes meanwhile, save what was there before, and end the process."""
        if skip_scheduler and self.progress.is_resumed:
            # --eval_on_start: this is no start.
            return {}
        try:
            with undone_on(EvaluationStopped, self), self.progress.evaluating():
                metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except EvaluationStopped:
            self._save_checkpoint(self.model, trial)
            raise
        self.due.evaluate = False
        return metrics

    def do_due_work(self) -> None:
        """Do what was still to do when the checkpoint that is resumed was saved, as the run never stopped did it."""
        due, saved = self.due, self.due.saved
        if saved is None:
            return
        is_epoch_over = due.is_epoch_over()
        self.control.should_training_stop |= due.is_stopped()
        if saved["evaluate"] or is_epoch_over:
            self._load_rng_state(due.path)
            self.progress.restore_random_state()
            due.is_repeating = True
            if saved["evaluate"]:
                due.place = saved["place"]
                self.control.should_evaluate, self.control.should_save = True, saved["save"]
                self._log_save_evaluate_again(saved)
            if is_epoch_over:
                self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
                self._log_save_evaluate_again(saved)
            due.is_repeating, self.progress.saved_by_others = False, None
            due.keep_random_state()
        # A callback has ended the run, such as the one for early stopping.
        self.progress.is_finished |= self.control.should_training_stop
        due.saved = None

    def _log_save_evaluate_again(self, saved: dict) -> None:
        """Log, evaluate and save by the flags of `control`; the step itself was checked when it was taken."""
        figures = {"learning_rate": saved["learning_rate"]}
        arguments = (None, self.state.epoch, self._ignore_keys_for_eval, time.time())
        CheckpointMixin._maybe_log_save_evaluate(
            self, getattr(self, LOSS), saved["grad_norm"], self.model, *arguments, **figures
        )

    def _load_rng_state(self, checkpoint):
        """Load the random state of a checkpoint, or the one after the work that was due."""
        kept = self.due.random_state
        super()._load_rng_state(checkpoint if kept is None else kept.name)

    # Writing.

    def log(self, logs, start_time=None):
        """Write a line of the log; the last one reports the time of the complete run."""
        self.progress.count_earlier_time(logs)
        super().log(logs, start_time)

    # Trainer's own writes in place: a save that is cut off leaves half a checkpoint, under the name of a complete one.
    def _save_checkpoint(self, model, trial):
        """Write checkpoint-N; after a signal end the process, with the code that says so."""
        stopped_by, step = self.progress.stop_requested, self.state.global_step
        if stopped_by and step == 0:
            logger.warning(
                "%s before the first step: nothing to save, leaving with code %d.", stopped_by, EXIT_RESUMABLE
            )
            raise SystemExit(EXIT_RESUMABLE)
        with self.stopped_clock():
            final = Path(self._get_output_dir(trial)) / f"checkpoint-{step}"
            # A signal may come after the save of a model alone, at the same step.
            saved = final, self.checkpoint_writer.is_model_only
            if self.progress.last_saved != saved:
                self.store_flos()
                if self.state.best_global_step:
                    best = final.with_name(f"checkpoint-{self.state.best_global_step}")
                    self.state.best_model_checkpoint = str(best) if best == final or best.is_dir() else None
                self.checkpoint_writer.write(final)
                self.progress.last_saved = saved
                if self.args.push_to_hub:
                    self.push_checkpoint(str(final))
            if stopped_by:
                how = how_to_go_on(self.args.resume_from_checkpoint)
                logger.warning("%s: %s is saved, leaving with code %d.%s", stopped_by, final, EXIT_RESUMABLE, how)
                raise SystemExit(EXIT_RESUMABLE)


def how_to_go_on(wanted) -> str:
    """Return what to leave out of the command that continues a run, "" where it can be started as it was.

    wanted: --resume_from_checkpoint, which may name another checkpoint, or none.
    """
    is_newest = str(wanted).lower() in ("none", "true")
    return "" if is_newest else f" To continue from it, leave --resume_from_checkpoint {wanted} out of the command."
