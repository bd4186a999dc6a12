"""Stop a run that has gone wrong, on all ranks together and before anything is written."""

import math

import torch

from llava_lite.train.interrupt import any_rank
from llava_lite.train.ranks import everyone

# These see a gradient only in a step that has a picture.
PICTURE_PARTS = ("mm_projector", "vision_tower")


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not finite."""


def stop_if_not_finite(loss, sample_ids, step):
    """Raise NonFiniteError on every rank, naming the samples, if the loss of a micro-batch is NaN or infinite on one.

    loss: scalar tensor. All ranks must call this; it costs them one number over the network.
    """
    finite = bool(torch.isfinite(loss))
    if not any_rank(not finite, loss.device):
        return
    reports = everyone(None if finite else f"loss {loss.item()} for samples {list(sample_ids)}")
    where = "; ".join(f"rank {rank}: {report}" for rank, report in enumerate(reports) if report is not None)
    raise NonFiniteError(
        f"step {step}: {where}. Nothing was written after the last checkpoint. Look at these records, lower the "
        "learning rate, and if this is fp16 use bf16 or fp32."
    )


def stop_if_gradient_not_finite(grad_norm, sample_ids, step):
    """Raise NonFiniteError if the gradient norm, equal on all ranks, is NaN or infinite."""
    if grad_norm is None or math.isfinite(float(grad_norm)):
        return
    ids = [sample for ids in everyone(list(sample_ids)) for sample in ids]
    raise NonFiniteError(
        f"step {step}: the losses are finite but the gradient norm is {float(grad_norm)}; samples of the step: {ids}. "
        "Nothing was written after the last checkpoint. Lower the learning rate or set --max_grad_norm."
    )


class GradientWatch:
    """Sees whether each group that should train gets a gradient that is not zero.

    Hooks on the parameters see it before any engine takes it away; they are gone once every group was seen.
    """

    def __init__(self, groups):
        self.seen = {}
        self.handles = []
        for group in groups:
            for param in group.parameters:
                self.handles.append(param.register_hook(self.hook(group.name)))
            self.seen[group.name] = None

    def hook(self, name):
        """Return the hook that notes, on the device, whether a gradient of this group is not zero."""

        def note(grad):
            flag = (grad != 0).any()
            self.seen[name] = flag if self.seen[name] is None else self.seen[name] | flag

        return note

    def check(self, has_pictures, exempt=(), learns=True):
        """Raise ValueError on every rank if a group got no gradient on any; call after an optimizer step.

        has_pictures: whether this rank's step had one. exempt: groups that may still be without. learns: whether its
        step had a supervised token; where all its records were left out there is nothing to see.
        """
        if not self.handles:
            return
        own = {"": bool(has_pictures), "learns": bool(learns)}
        flags = everyone({name: bool(flag) for name, flag in self.seen.items()} | own)
        if not any(rank["learns"] for rank in flags):
            return
        silent = [name for name in self.seen if not any(rank[name] for rank in flags)]
        if not silent:
            self.close()
        waits_for_picture = PICTURE_PARTS if not any(rank[""] for rank in flags) else ()
        dead = [n for n in silent if n.removesuffix("_no_decay") not in (*waits_for_picture, *exempt)]
        if dead:
            raise ValueError(
                f"{', '.join(dead)} should train but got no gradient in the first step. Is there a record with "
                "something to learn, and does a custom attention or checkpointing cut the graph?"
            )

    def close(self):
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
