"""Turn a resumed optimizer into one that steps as the flags of this run say, and not as those of its checkpoint."""

from __future__ import annotations

import logging

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

# Of a group of parameters, what is not a setting.
_NO_SETTINGS = ("params", "lr")
# A run is looked through to its end only where it may be all warm-up.
_FEW_STEPS = 10


class FollowFlags(TrainerCallback):
    """Give a run that is taken up its own rate before its first step.

    An optimizer and its scheduler come back from a checkpoint with the rate of the schedule that ended there: of one
    that was complete, 0, at which a prolonged run would take its first step; and with the peak rate and weight decay
    of that run, whatever the flags say now. Where the flags are the same nothing changes, bit for bit.
    """

    def __init__(self):
        self.settings, self.base_rates = None, None

    def note(self, optimizer, scheduler) -> None:
        """Remember what the flags say, before a checkpoint is read over it."""
        self.settings = [settings_of(group) for group in optimizer.param_groups]
        self.base_rates = list(scheduler.base_lrs) if isinstance(scheduler, LambdaLR) else None

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        """Put the settings and the rate of this step into optimizer and scheduler."""
        if self.base_rates is None or not isinstance(lr_scheduler, LambdaLR):
            # A scheduler of DeepSpeed's JSON, or one that follows the loss.
            return
        if state.global_step > 0:
            set_rates(optimizer, lr_scheduler, self.settings, self.base_rates)
        if state.is_world_process_zero:
            warn_of_rate_zero(lr_scheduler, state.global_step, state.max_steps)


def settings_of(group: dict) -> dict:
    """Return what a group of parameters is set to, its rate of this moment left out."""
    return {key: value for key, value in group.items() if key not in _NO_SETTINGS}


def set_rates(optimizer, scheduler: LambdaLR, settings: list[dict], base_rates: list) -> None:
    """Set every group to `settings`, and to the rate of the scheduler's own step from `base_rates`."""
    rates = [
        base * factor(scheduler.last_epoch) for base, factor in zip(base_rates, scheduler.lr_lambdas, strict=True)
    ]
    saved = [float(group["lr"]) for group in optimizer.param_groups]
    for group, own, rate in zip(optimizer.param_groups, settings, rates, strict=True):
        group.update(own)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler.load_state_dict(scheduler.state_dict() | {"base_lrs": list(base_rates), "_last_lr": list(rates)})
    if saved != [float(rate) for rate in rates]:
        logger.info(
            "the learning rate goes on at %g, as this run's schedule says; the checkpoint was saved at %g.",
            rates[0],
            saved[0],
        )


def warn_of_rate_zero(scheduler: LambdaLR, step: int, max_steps: int) -> None:
    """Say if every step that is left is taken at rate 0, as the only step of a run with warm-up is."""
    left = range(step, max_steps)
    if 0 < len(left) <= _FEW_STEPS and all(factor(i) == 0 for factor in scheduler.lr_lambdas for i in left):
        logger.warning(
            "the learning rate is 0 in all of the %d steps of this run, where its warm-up begins: nothing is learned. "
            "Give --warmup_steps 0, or more steps.",
            len(left),
        )
