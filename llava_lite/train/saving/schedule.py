"""Set a resumed optimizer and its schedule to the flags of this run, in place of those of its checkpoint."""

import logging
from inspect import signature

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

# Keys of a parameter group that are no settings, and one that a schedule adds.
_NO_SETTINGS, _OF_SCHEDULE = ("params", "lr"), "initial_lr"
# Rates are checked to the end of a run only if it is so short that it may be all warm-up.
_FEW_STEPS = 10


class FollowFlags(TrainerCallback):
    """Give a resumed run the learning rate of its own flags before its first step.

    A checkpoint restores optimizer and scheduler with the rate at which it was saved: 0 after a complete schedule, at
    which a prolonged run would take its first step; and with the peak rate and weight decay of that run, whatever the
    flags are now. Where the flags are the same nothing changes, bit for bit.
    """

    def __init__(self):
        self.settings, self.base_rates = None, None

    def note(self, optimizer, scheduler) -> None:
        """Keep the settings of the flags, before a checkpoint overwrites them."""
        self.settings = get_settings(optimizer)
        self.base_rates = list(scheduler.base_lrs) if isinstance(scheduler, LambdaLR) else None

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        """Set the settings and the rate of this step in optimizer and scheduler."""
        if self.base_rates is None or not isinstance(lr_scheduler, LambdaLR):
            # A scheduler of DeepSpeed's JSON, or one that depends on the loss.
            return
        if state.global_step > 0:
            set_rates(optimizer, lr_scheduler, self.settings, self.base_rates)
        if state.is_world_process_zero:
            warn_if_rate_is_zero(lr_scheduler, state.global_step, state.max_steps)


def get_settings(optimizer) -> list[dict]:
    """Return the settings of each parameter group without its present rate: what the optimizer's class is made with.

    Other values of a group are its progress, such as the steps that a schedule-free optimizer counts there.
    """
    while inner := getattr(optimizer, "optimizer", None):
        optimizer = inner
    names = {name for kind in type(optimizer).__mro__ for name in signature(kind.__init__).parameters}
    names = names - set(_NO_SETTINGS) | {_OF_SCHEDULE}
    return [{key: value for key, value in group.items() if key in names} for group in optimizer.param_groups]


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
            "the learning rate continues at %g, by the schedule of this run; the checkpoint was saved at %g.",
            rates[0],
            saved[0],
        )


def warn_if_rate_is_zero(scheduler: LambdaLR, step: int, max_steps: int) -> None:
    """Warn if every step that is left has rate 0, such as the only step of a run with warm-up."""
    left = range(step, max_steps)
    if 0 < len(left) <= _FEW_STEPS and all(factor(i) == 0 for factor in scheduler.lr_lambdas for i in left):
        logger.warning(
            "the learning rate is 0 in all of the %d steps of this run, the start of its warm-up: nothing is trained. "
            "Give --warmup_steps 0, or more steps.",
            len(left),
        )
