"""Remember what a run has seen between two logged steps, and turn SIGTERM into a checkpoint."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from contextlib import contextmanager

import torch
from transformers import TrainerCallback

# sysexits.h, EX_TEMPFAIL: "the user is invited to retry". Saved after SIGTERM; the same command goes on from there.
EXIT_RESUMABLE = 75


class ProgressCallback(TrainerCallback):
    """The part of a run's state that the stock Trainer keeps in memory only, and the wish to stop.

    first_step, seconds_before: step at which the run began, seconds it had run before this process took it up.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.saved, self.last_saved = None, None
        self.first_step, self.seconds_before, self._started_s = 0, 0.0, time.time()
        self.stop_requested, self._signalled, self._handler = False, False, None

    def state(self) -> dict:
        """Return this rank's progress, readable under `weights_only`."""
        trainer = self.trainer
        return {
            "loss_since_log": trainer._tr_loss.detach().cpu(),
            "loss_logged": trainer._total_loss_scalar,
            "last_logged_step": trainer._globalstep_last_logged,
            "first_step": self.first_step,
            "seconds": self.seconds_before + time.time() - self._started_s,
            "frozen": trainer._frozen_prints,
            "more": trainer.progress_state(),
        }

    def load(self, path: str) -> None:
        """Read the progress that this rank saved; it is taken up when training begins."""
        self.saved = torch.load(path, map_location="cpu", weights_only=True)

    def on_train_begin(self, args, state, control, **kwargs):
        """Take up the saved progress and listen to SIGTERM."""
        trainer, saved = self.trainer, self.saved
        self._started_s = time.time()
        self.first_step = state.global_step if saved is None else saved["first_step"]
        if saved is not None:
            trainer._tr_loss = saved["loss_since_log"].to(args.device)
            trainer._total_loss_scalar = saved["loss_logged"]
            trainer._globalstep_last_logged = saved["last_logged_step"]
            self.seconds_before = saved["seconds"]
            trainer.load_progress_state(saved["more"])
            self.saved = None
        if threading.current_thread() is threading.main_thread():
            self._listen()

    def _listen(self) -> None:
        """Note SIGTERM instead of dying of it.

        Launchers and schedulers send it to the whole process tree. Loader workers inherit that it is blocked, so none
        dies of it and takes the rank along before it could save; a handler set in a worker would come too late for one
        that is just starting. Threads that were there before do not block it: for them there is the handler.
        """
        self._handler = signal.signal(signal.SIGTERM, self._note_sigterm)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def _note_sigterm(self, signum, frame):
        self._signalled = True

    def on_step_end(self, args, state, control, **kwargs):
        """Save and stop once any rank was told to; launchers tell them at different moments.

        The same message tells the ranks that one of them could not read a record of the step.
        """
        is_told = self._signalled or signal.SIGTERM in signal.sigpending()
        stop, has_news = any_rank_each([is_told, self.trainer.has_news], args.device)
        if has_news:
            self.trainer.settle()
        if stop:
            # SIGKILL follows SIGTERM, mostly after 30 s: the save comes before an evaluation that is due.
            self.stop_requested, control.should_save, control.should_evaluate = True, True, False

    def on_train_end(self, args, state, control, **kwargs):
        """Hand SIGTERM back to whoever had it."""
        self.hand_back()

    @contextmanager
    def workers_ended(self):
        """Let the loader's workers end if training ends with an error.

        They inherit that SIGTERM is blocked, with which Python would end them when it exits, and wait for them: a run
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


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return on every rank whether the flag is set on one: one number a step over the network."""
    return any_rank_each([flag], device)[0]


def any_rank_each(flags: list[bool], device: torch.device) -> list[bool]:
    """Return on every rank which of the flags are set on one, in one message."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flags
    numbers = torch.tensor([int(flag) for flag in flags], device=device)
    torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
    return [bool(number) for number in numbers.tolist()]
