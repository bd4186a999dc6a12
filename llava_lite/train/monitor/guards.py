"""Stop a run that diverges or trains nothing, on all ranks together and before anything is written."""

import math
from functools import partial

import torch

from llava_lite.distributed.ranks import everyone
from llava_lite.train.saving.interrupt import any_rank_each

# These get a gradient only in a step with an image.
IMAGE_PARTS = ("mm_projector", "vision_tower")


class NoGradientError(ValueError):
    """A group of weights that should train got no gradient; every rank raises it with the same message."""

    reported_by_first_of = "RANK"


def describe_loss(loss, sample_ids, step, is_half=False) -> str:
    """Return on every rank which ranks have a loss that is NaN or infinite, with the samples; "" if none has.

    loss: scalar tensor of a micro-batch. is_half: whether it was computed in float16. All ranks must call this; it
    costs them one number over the network.
    """
    finite = bool(torch.isfinite(loss))
    if not any_rank_each([not finite], loss.device)[0]:
        return ""
    reports = everyone(None if finite else f"loss {loss.item()} for samples {list(sample_ids)}")
    where = "; ".join(f"rank {rank}: {report}" for rank, report in enumerate(reports) if report is not None)
    advice = f"step {step}: {where}. Look at these records, or lower the learning rate"
    return f"{advice}; or use --bf16 True, since float16 overflows at 65,504." if is_half else f"{advice}."


def describe_gradient(grad_norm, sample_ids, step) -> str:
    """Return the message for a gradient norm, equal on all ranks, that is NaN or infinite; "" if it is finite."""
    if grad_norm is None or math.isfinite(float(grad_norm)):
        return ""
    ids = [sample for ids in everyone(list(sample_ids)) for sample in ids]
    return (
        f"step {step}: the losses are finite but the gradient norm is {float(grad_norm)}; samples of the step: {ids}. "
        "Lower the learning rate or set --max_grad_norm."
    )


class GradientWatch:
    """Checks that each parameter group gets a gradient that is not zero.

    Hooks on the parameters see it before an engine frees it; they are removed once every group had one.
    """

    def __init__(self, groups):
        self.seen = {group.name: None for group in groups}
        self.handles = [
            param.register_hook(partial(self.note, group.name)) for group in groups for param in group.parameters
        ]

    def note(self, name, grad):
        """Record, on the device, whether a gradient of the group of this name is not zero."""
        flag = (grad != 0).any()
        self.seen[name] = flag if self.seen[name] is None else self.seen[name] | flag

    def check(self, has_images, exempt=(), is_supervised=True):
        """Raise NoGradientError on every rank if a group got no gradient on any; call after an optimizer step.

        has_images: whether this rank's step had one. exempt: groups that may have none. is_supervised: whether its
        step had a supervised token; where all its records were left out there is nothing to check.
        """
        if not self.handles:
            return
        own = {"": bool(has_images), "is_supervised": bool(is_supervised)}
        flags = everyone({name: bool(flag) for name, flag in self.seen.items()} | own)
        if not any(rank["is_supervised"] for rank in flags):
            return
        silent = [name for name in self.seen if not any(rank[name] for rank in flags)]
        if not silent:
            self.close()
        waits_for_image = IMAGE_PARTS if not any(rank[""] for rank in flags) else ()
        dead = [n for n in silent if n.removesuffix("_no_decay") not in (*waits_for_image, *exempt)]
        if dead:
            raise NoGradientError(
                f"{', '.join(dead)} should train but got no gradient in the first step. Has a record supervised "
                "tokens, and does a custom attention or checkpointing cut the graph?"
            )

    def close(self):
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
