"""Remember what a run has seen between two logged steps, and turn SIGTERM into a checkpoint."""

import signal
import threading
import time
import traceback
from contextlib import contextmanager

import torch
from transformers import TrainerCallback

from llava_lite.distributed.activity import waiting_for_ranks
from llava_lite.train.saving import other_ranks as other

# sysexits.h, EX_TEMPFAIL: "the user is invited to retry". Saved after SIGTERM; the same command resumes the run.
EXIT_RESUMABLE = 75
# What Trainer counts between two logged steps and writes nowhere; it has no public name for any of it.
LOSS, LOSS_LOGGED, LAST_LOGGED_STEP = "_tr_loss", "_total_loss_scalar", "_globalstep_last_logged"
FIRST_STEP = "_initial_global_step"


class ProgressCallback(TrainerCallback):
    """The part of a run's state that Trainer keeps in memory only, and the request to stop.

    Not an ExportableState: that is one JSON of the first rank, and this is a file of tensors for every rank.

    first_step, seconds_before: step at which the run began, seconds that it had run before this process resumed it.
    frozen: checksums of the frozen weights. saved_by_others: (path, number of ranks) of a checkpoint that another
    number of ranks saved. is_finished: whether a run has all its steps before its first batch.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.saved, self.last_saved, self.frozen, self.saved_by_others = None, None, {}, None
        self.first_step, self.seconds_before, self._started_s = 0, 0.0, time.time()
        self.stop_requested, self._signalled, self._handler = False, False, None
        self.epoch, self.is_finished = 0, False

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
            "more": trainer.progress_state(),
        }

    def load(self, path: str) -> None:
        """Read the progress that this rank saved; it is restored when training begins."""
        self.saved = torch.load(path, map_location="cpu", weights_only=True)

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Restore the saved progress and listen to SIGTERM."""
        trainer, saved = self.trainer, self.saved
        self._started_s = time.time()
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
        self.epoch, self._batches_to_skip = divmod(state.global_step, steps_an_epoch(train_dataloader, args))
        self.is_finished = state.global_step >= state.max_steps
        if threading.current_thread() is threading.main_thread():
            self._listen()

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Begin the epoch; a finished run that is started again stops before its first batch."""
        if self.is_finished:
            control.should_training_stop = True
        self.trainer.set_sampler_epoch(train_dataloader, self.epoch)
        self.trainer.begin_epoch(self.epoch)
        self._restore_random_state()

    def on_step_begin(self, args, state, control, **kwargs):
        """Restore the random state after the batches that a resumed epoch skips, as Trainer does."""
        if self._batches_to_skip:
            self._restore_random_state()
        self.saved_by_others = None

    def _restore_random_state(self) -> None:
        """Restore a random state where another number of ranks saved, and Trainer finds no file for this rank."""
        if self.saved_by_others is not None:
            other.restore_random_state(self.trainer, *self.saved_by_others)

    def on_epoch_end(self, args, state, control, **kwargs):
        """Count the epoch; of a run that has trained nothing, nothing is written again."""
        self.epoch += 1
        if self.is_finished:
            control.should_log = control.should_evaluate = control.should_save = False

    def count_earlier_time(self, metrics: dict) -> None:
        """Turn the time and speed of this process, in the metrics that end a run, into those of the complete run."""
        if self.seconds_before and "train_runtime" in metrics:
            seconds = metrics["train_runtime"]
            metrics["train_runtime"] = round(seconds + self.seconds_before, 4)
            for key in ("train_samples_per_second", "train_steps_per_second"):
                metrics[key] = round(metrics[key] * seconds / (seconds + self.seconds_before), 3)

    def _listen(self) -> None:
        """Note SIGTERM instead of dying of it.

        Launchers and schedulers send it to the process tree. Loader workers inherit that it is blocked, so none dies
        of it and takes the rank along before it could save; a handler set in a worker would come too late for one that
        is just starting. Threads that were there before do not block it: for them there is the handler.
        """
        self._handler = signal.signal(signal.SIGTERM, self._note_sigterm)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def _note_sigterm(self, signum, frame):
        self._signalled = True

    def on_step_end(self, args, state, control, **kwargs):
        """Save and stop once any rank received SIGTERM; launchers send it to the ranks at different moments.

        The same message carries whether a rank could not read a record of the step, and whether its update is finite.
        """
        is_signalled = self._signalled or signal.SIGTERM in signal.sigpending()
        mine = [is_signalled, self.trainer.has_news, self.trainer.has_bad_update()]
        stop, has_news, self.trainer.is_update_bad = any_rank_each(mine, args.device)
        if has_news:
            self.trainer.agree_on_left_out()
        if stop:
            # SIGKILL follows SIGTERM, mostly after 30 s: the save comes before an evaluation that is due.
            self.stop_requested, control.should_save, control.should_evaluate = True, True, False

    def on_train_end(self, args, state, control, **kwargs):
        """Give SIGTERM back to its former handler."""
        self.hand_back()

    @contextmanager
    def workers_ended(self):
        """Let the loader's workers end if training ends with an error.

        They inherit that SIGTERM is blocked, with which Python would end them at exit, and it waits for them: a run
        that failed would never return. They end with the loader's iterator, which the frames of the error hold.
        """
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            self.hand_back()
            if self.trainer.args.dataloader_persistent_workers:
                # Those end with their loader.
                self.trainer.callback_handler.train_dataloader = None
                self.trainer.accelerator.free_memory()
            cause = error
            while cause is not None:
                traceback.clear_frames(cause.__traceback__)
                cause = cause.__cause__ or cause.__context__
            raise

    def hand_back(self) -> None:
        """Let SIGTERM end this process again."""
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            self._handler = None


def steps_an_epoch(train_dataloader, args) -> int:
    """Return the optimizer steps of an epoch, as Trainer counts them: all, where the records are not counted."""
    try:
        num_batches = len(train_dataloader)
    except TypeError:
        return args.max_steps
    return max(1, -(-num_batches // args.gradient_accumulation_steps))


def any_rank_each(flags: list[bool], device: torch.device) -> list[bool]:
    """Return on every rank which of the flags are set on one of them, in one message."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flags
    numbers = torch.tensor([int(flag) for flag in flags], device=device)
    with waiting_for_ranks():
        torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
        return [bool(number) for number in numbers.tolist()]
