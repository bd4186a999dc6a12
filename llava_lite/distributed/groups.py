"""Give process groups the timeout of the run."""

from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch.distributed as dist

# The watch, which can say who hangs, comes before a group's own timeout.
GRACE_S = 30


def set_group_timeouts(timeout_s: float, *owners) -> int:
    """Give the default group and the groups that objects hold a timeout, and return how many there are.

    torch and DeepSpeed make further groups with 10 or 30 minutes, whatever the first one has, and hand them to no one:
    they are found in the attributes of engine, optimizer and the modules of a model.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    groups = {id(group): group for group in (dist.group.WORLD, *find_groups(owners))}
    for group in groups.values():
        group.set_timeout(timedelta(seconds=timeout_s + GRACE_S))
    return len(groups)


def find_groups(owners: Iterable) -> Iterator[dist.ProcessGroup]:
    """Yield the groups in the attributes of objects, of what wrappers wrap, and of a model's modules."""
    for owner in owners:
        inner = getattr(owner, "optimizer", None)
        modules = owner.modules() if hasattr(owner, "modules") else ()
        for holder in (owner, inner, *modules):
            for value in vars(holder).values() if hasattr(holder, "__dict__") else ():
                values = value.values() if isinstance(value, dict) else [value]
                yield from (one for one in values if isinstance(one, dist.ProcessGroup))
