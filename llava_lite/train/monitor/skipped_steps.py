"""Stop a run, or leave a step out, where loss, gradient, weights or optimizer state are not finite."""

import logging
import math

import torch
from transformers import TrainerCallback

from llava_lite.distributed.ranks import everyone
from llava_lite.train.monitor.finite import NonFiniteError, find_in, find_non_finite, list_names
from llava_lite.train.monitor.guards import describe_gradient, describe_loss
from llava_lite.train.saving.interrupt import LOSS, any_rank_each

logger = logging.getLogger(__name__)

UNTOUCHED = "Nothing was written after the last checkpoint."


class LeaveOut(TrainerCallback):
    """Let a step be left out: by the optimizer, and of what the log adds up."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        """Keep what was added up before a step that may be left out."""
        if self.trainer.may_skip:
            self.trainer.sums_before = self.trainer.copy_sums()

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Drop the gradients of a step that is not finite, on all ranks; an engine of DeepSpeed does so itself.

        Without gradients the optimizer changes neither weights nor moments.
        """
        trainer = self.trainer
        if not trainer.may_skip or trainer.is_deepspeed_enabled:
            return
        gradients = [(name, param.grad) for name, param in model.named_parameters() if param.grad is not None]
        is_bad = trainer.loss_problem != "" or find_in(gradients) != []
        if any_rank_each([is_bad], args.device)[0]:
            optimizer.zero_grad(set_to_none=True)
            trainer.is_dropped = True


class FiniteMixin:
    """Trainer overrides: every step is finite, or it is left out, or the run stops in it.

    num_skipped, num_skipped_since_log: steps that were left out so far, of the run and since the last line of the log;
    a checkpoint keeps both. sums_before: what `copy_sums` returned before the step.
    """

    num_skipped, num_skipped_since_log, sums_before = 0, 0, None
    loss_problem, is_dropped, is_update_bad = "", False, False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(LeaveOut(self))

    def train(self, *args, **kwargs):
        """Train; the mean loss that is returned is that of the log, over the steps that were taken."""
        self.num_skipped = self.num_skipped_since_log = 0
        result = super().train(*args, **kwargs)
        return result._replace(training_loss=result.metrics.get("train_loss", math.nan))

    # A subclass extends these two.

    def copy_sums(self) -> dict:
        """Return a copy of what is added up over the steps for the next line of the log."""
        return {"loss": getattr(self, LOSS).clone()}

    def restore_sums(self, sums: dict) -> None:
        """Take back what `copy_sums` returned: a step that is left out counts in no mean."""
        # In place: Trainer has handed the tensor to whoever logs it.
        getattr(self, LOSS).copy_(sums["loss"])

    @property
    def may_skip(self) -> bool:
        """Whether steps may be left out in this run."""
        return getattr(self.args, "max_skipped_steps", 0) > 0

    def checked_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss of a micro-batch; NonFiniteError on all ranks if it is not finite on one.

        Where the step may be left out it is noted, and the loss made NaN on every rank: an infinite one may have a
        finite gradient, and the engine leaves a step out by its gradient.
        """
        problem = describe_loss(loss.detach(), self.sample_ids, self.state.global_step + 1, self.args.fp16)
        if not problem:
            return loss
        if self.num_skipped >= getattr(self.args, "max_skipped_steps", 0):
            raise NonFiniteError(self.describe_stop(problem))
        self.loss_problem = self.loss_problem or problem
        return loss * float("nan")

    def describe_stop(self, problem: str) -> str:
        """Return the message that ends the run."""
        used = f" All {self.num_skipped} steps of --max_skipped_steps are used." if self.may_skip else ""
        return f"{problem} {UNTOUCHED}{used}"

    def has_bad_update(self) -> bool:
        """Tell whether weights or optimizer state of this rank are not finite after the step."""
        return bool(find_non_finite(self.model, self.optimizer))

    def check_step(self, grad_norm):
        """Return the gradient norm for the log, None for a step that was left out; NonFiniteError ends the run.

        All ranks must call it, once after each optimizer step.
        """
        loss_problem, is_dropped = self.loss_problem, self.is_dropped
        self.loss_problem, self.is_dropped = "", False
        # Loss scaling in fp16 provokes infinite gradients on purpose and skips the step.
        checks_gradient = not self.args.fp16 and not loss_problem
        problem = loss_problem or (
            describe_gradient(grad_norm, self.ids_of_step, self.state.global_step) if checks_gradient else ""
        )
        if problem:
            if self.is_deepspeed_enabled and self.may_skip:
                is_dropped = not self.model_wrapped.was_step_applied()
            if not is_dropped or self.num_skipped >= self.args.max_skipped_steps:
                raise NonFiniteError(self.describe_stop(problem))
        if self.is_update_bad:
            raise NonFiniteError(self.describe_update())
        if not problem:
            return grad_norm
        self.num_skipped, self.num_skipped_since_log = self.num_skipped + 1, self.num_skipped_since_log + 1
        self.restore_sums(self.sums_before)
        logger.warning(
            "%s The step is left out: %d of --max_skipped_steps %d.",
            problem,
            self.num_skipped,
            self.args.max_skipped_steps,
        )
        return None

    def describe_update(self) -> str:
        """Return the message for weights or optimizer state that are not finite; all ranks must call it."""
        reports = everyone((find_non_finite(self.model, self.optimizer), list(self.ids_of_step)))
        found = "; ".join(f"rank {rank}: {list_names(names)}" for rank, (names, _) in enumerate(reports) if names)
        ids = [sample for _, own in reports for sample in own]
        return (
            f"step {self.state.global_step}: the update left numbers that are not finite: {found}; samples of the "
            f"step: {ids}. {UNTOUCHED} Lower the learning rate."
        )

    def progress_state(self) -> dict:
        """Return the state of the parents, and how many steps were left out."""
        own = {"skipped_steps": self.num_skipped, "skipped_since_log": self.num_skipped_since_log}
        return super().progress_state() | own

    def load_progress_state(self, state: dict) -> None:
        """Restore them; a checkpoint from before they were kept has none."""
        super().load_progress_state(state)
        self.num_skipped = state.get("skipped_steps", 0)
        self.num_skipped_since_log = state.get("skipped_since_log", 0)

    def mean_over_taken(self, logs: dict, key: str, num_steps: int, num_skipped: int) -> int:
        """Make a loss of the log, which Trainer divided by all steps, the mean over those taken; return their number.

        Where every step was left out there is no loss, and the key is dropped.
        """
        num_taken = num_steps - num_skipped
        if num_skipped:
            total = logs.pop(key) * num_steps
            logs |= {key: total / num_taken} if num_taken else {}
        return num_taken
