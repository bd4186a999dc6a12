"""Remember what a run has seen between two logged steps, and turn a signal into a checkpoint."""

import signal
import time
import traceback
from contextlib import contextmanager

import torch
from transformers import TrainerCallback

from llava_lite.distributed.activity import waiting_for_ranks
from llava_lite.hub.pickles import load_pickle
from llava_lite.train.saving import other_ranks as other
from llava_lite.train.saving.signals import SignalWatch

# sysexits.h, EX_TEMPFAIL: "the user is invited to retry". Saved after a signal; the same command resumes the run.
EXIT_RESUMABLE = 75
# What Trainer counts between two logged steps and writes nowhere; it has no public name for any of it.
LOSS, LOSS_LOGGED, LAST_LOGGED_STEP = "_tr_loss", "_total_loss_scalar", "_globalstep_last_logged"
FIRST_STEP = "_initial_global_step"
EVALUATION_LOADERS = "_eval_dataloaders"


class EvaluationStopped(Exception):
    """A signal came in an evaluation; raised on all ranks together."""


class ProgressCallback(TrainerCallback):
    """The part of a run's state that Trainer keeps in memory only, and the request to stop.

    Not an ExportableState: that is one JSON of the first rank, and this is a file of tensors for every rank.

    first_step, seconds_before: step at which the run began, seconds that it had run before this process resumed it.
    frozen: checksums of the frozen weights. last_saved: (path, whether it holds the model alone) of the last save.
    saved_by_others: (path, number of ranks) of a checkpoint that another number of ranks saved. is_finished: whether a
    run has all its steps before its first batch. stop_requested: the name of the signal after which a run saves and
    ends. leaves_process: nobody needs the signals after that. batches: the iterator of the epoch.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.saved, self.last_saved, self.frozen, self.saved_by_others = None, None, {}, None
        self.first_step, self.seconds_before, self._started_s = 0, 0.0, time.time()
        self.signals, self.stop_requested, self.leaves_process = SignalWatch(), None, False
        self.epoch, self.is_finished, self.is_resumed, self.is_evaluating = 0, False, False, False
        self.batches = None

    def state(self) -> dict:
        """Return this rank's progress, readable under `weights_only`."""
        trainer = self.trainer
        return {
            "loss_since_log": getattr(trainer, LOSS).detach().cpu(),
            "loss_logged": getattr(trainer, LOSS_LOGGED),
            "last_logged_step": getattr(trainer, LAST_LOGGED_STEP),
            "first_step": self.first_step,
            "seconds": self.seconds_before + time.time() - self._started_s,
            "frozen": self.frozen,
            "due": trainer.due.state(),
            "more": trainer.progress_state(),
        }

    def load(self, path: str) -> None:
        """Read the progress that this rank saved; it is restored when training begins."""
        self.saved = load_pickle(path)

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Restore the saved progress and listen to signals."""
        trainer, saved = self.trainer, self.saved
        self._started_s, self.stop_requested, self.is_resumed = time.time(), None, saved is not None
        self.first_step = state.global_step if saved is None else saved["first_step"]
        if saved is not None:
            setattr(trainer, LOSS, saved["loss_since_log"].to(args.device))
            setattr(trainer, LOSS_LOGGED, saved["loss_logged"])
            setattr(trainer, LAST_LOGGED_STEP, saved["last_logged_step"])
            # The mean loss and the speed that end a run are those of all its steps.
            setattr(trainer, FIRST_STEP, self.first_step)
            self.seconds_before = saved["seconds"]
            trainer.load_progress_state(saved["more"])
            self.saved = None
        num_steps = steps_an_epoch(train_dataloader, args)
        self.epoch, self._batches_to_skip = divmod(state.global_step, num_steps)
        self.is_finished = state.global_step >= state.max_steps
        trainer.due.begin(num_steps)
        self.signals.listen()

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Begin the epoch; a finished run that is started again stops before its first batch."""
        if self.is_finished:
            control.should_training_stop = True
        self.trainer.set_sampler_epoch(train_dataloader, self.epoch)
        self.trainer.begin_epoch(self.epoch)
        self.restore_random_state()

    def on_step_begin(self, args, state, control, **kwargs):
        """Restore the random state after the batches that a resumed epoch skips, as Trainer does."""
        if self._batches_to_skip:
            self.restore_random_state()
        self.saved_by_others = None

    def restore_random_state(self) -> None:
        """Restore a random state where another number of ranks saved, and Trainer finds no file for this rank."""
        if self.saved_by_others is not None:
            other.restore_random_state(self.trainer, *self.saved_by_others)

    def on_epoch_end(self, args, state, control, **kwargs):
        """Count the epoch; of a run that has trained nothing, nothing is written again."""
        self.end_batches()
        if self.trainer.due.begin_epoch_end():
            self.epoch += 1
            if self.is_finished:
                control.should_log = control.should_evaluate = control.should_save = False

    def end_batches(self) -> None:
        """End the iterator of an epoch that was left before its last batch, and with it the workers.

        Frames may hold it: those of an error that a library has caught keep each other, as in matplotlib's import for
        the first plots. What collects them may come late, and then the queues that tell the workers to end are gone.
        """
        batches, self.batches = self.batches, None
        if hasattr(batches, "close"):
            batches.close()

    def count_earlier_time(self, metrics: dict) -> None:
        """Turn the time and speed of this process, in the metrics that end a run, into those of the complete run."""
        if self.seconds_before and "train_runtime" in metrics:
            seconds = metrics["train_runtime"]
            metrics["train_runtime"] = round(seconds + self.seconds_before, 4)
            for key in ("train_samples_per_second", "train_steps_per_second"):
                metrics[key] = round(metrics[key] * seconds / (seconds + self.seconds_before), 3)

    def on_step_end(self, args, state, control, **kwargs):
        """Save and stop once any rank received a signal; launchers send it to the ranks at different moments.

        The same message carries whether a rank could not read a record of the step, and whether its update is finite.
        """
        self.trainer.due.begin_step_end()
        mine = [self.signals.number, self.trainer.has_news, self.trainer.has_bad_update()]
        number, has_news, is_bad = highest_of_ranks(mine, args.device)
        self.trainer.is_update_bad = bool(is_bad)
        if has_news:
            self.trainer.agree_on_left_out()
        self._stop(number)

    def _stop(self, number: int) -> None:
        """Note the signal of this number, if it is one."""
        if number and self.stop_requested is None:
            self.stop_requested = signal.Signals(number).name

    def on_prediction_step(self, args, state, control, **kwargs):
        """Stop an evaluation after the batch in which a signal came."""
        self.stop_evaluation_if_signalled()

    def stop_evaluation_if_signalled(self) -> None:
        """Raise EvaluationStopped on all ranks in an evaluation of the run, once any received a signal."""
        if not self.is_evaluating:
            return
        self._stop(highest_of_ranks([self.signals.number], self.trainer.args.device)[0])
        if self.stop_requested:
            raise EvaluationStopped

    @contextmanager
    def evaluating(self):
        """Let a signal end the evaluation inside; one that has come already does so before it begins."""
        if self.stop_requested:
            raise EvaluationStopped
        self.is_evaluating = True
        try:
            yield
        finally:
            self.is_evaluating = False

    def on_train_end(self, args, state, control, **kwargs):
        """Give the signals back to their former handlers."""
        self.signals.hand_back()

    def end_persistent_workers(self) -> None:
        """Let go of the loaders whose workers outlive an epoch or an evaluation; these end with their loader."""
        trainer = self.trainer
        if trainer.args.dataloader_persistent_workers:
            trainer.callback_handler.train_dataloader = trainer.callback_handler.eval_dataloader = None
            # Trainer has no public name for where it keeps them.
            getattr(trainer, EVALUATION_LOADERS, {}).clear()
            trainer.accelerator.free_memory()

    @contextmanager
    def workers_ended(self):
        """Let the loaders' workers end when training ends, with an error or after a signal too.

        They end with the loader's iterator, which the frames of the error hold.
        """
        try:
            yield
            self.end_persistent_workers()
        except BaseException as error:
            is_saved = self.stop_requested is not None and isinstance(error, SystemExit)
            if not (is_saved and self.leaves_process):
                self.signals.hand_back(forget=is_saved)
            self.end_persistent_workers()
            self.batches = None
            cause = error
            while cause is not None:
                traceback.clear_frames(cause.__traceback__)
                cause = cause.__cause__ or cause.__context__
            raise


def steps_an_epoch(train_dataloader, args) -> int:
    """Return the optimizer steps of an epoch, as Trainer counts them: all, where the records are not counted."""
    try:
        num_batches = len(train_dataloader)
    except TypeError:
        return args.max_steps
    return max(1, -(-num_batches // args.gradient_accumulation_steps))


def any_rank_each(flags: list[bool], device: torch.device) -> list[bool]:
    """Return on every rank which of the flags are set on one of them, in one message."""
    return [bool(number) for number in highest_of_ranks(flags, device)]


def highest_of_ranks(numbers: list[int], device: torch.device) -> list[int]:
    """Return on every rank the highest of each number on any of them, in one message."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [int(number) for number in numbers]
    highest = torch.tensor([int(number) for number in numbers], device=device)
    with waiting_for_ranks():
        torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
        return highest.tolist()
