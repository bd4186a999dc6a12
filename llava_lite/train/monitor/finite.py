"""Find weights and optimizer state that are not finite, with few fused calls."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch.nn.utils import get_total_norm


class NonFiniteError(RuntimeError):
    """A loss, a gradient, a weight or optimizer state is not finite."""


# Names in a message; the rest are counted.
_NAMED = 4


def find_non_finite(model: torch.nn.Module, optimizer=None) -> list[str]:
    """Return the names of trained weights and of optimizer state, on this rank, that hold a NaN or an infinity.

    Of a ZeRO optimizer that is its shard: master weights and moments in float32. What lies on NVMe is not read.
    """
    return find_in(_named_tensors(model, optimizer))


def find_in(named: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Return the names of the tensors that hold a NaN or an infinity."""
    named = [(name, _as_plain(tensor)) for name, tensor in named if _can_be_non_finite(tensor)]
    # A few fused calls, finite in every healthy step; squares can overflow where every number is finite.
    if not named or bool(get_total_norm([tensor for _, tensor in named]).isfinite()):
        return []
    return [name for name, tensor in named if not bool(torch.isfinite(tensor).all())]


def list_names(names: list[str]) -> str:
    """Return the first names and how many there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _can_be_non_finite(tensor: torch.Tensor) -> bool:
    # Single numbers are counts of steps.
    return tensor.dim() > 0 and tensor.numel() > 0 and tensor.is_floating_point()


def _as_plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that fused calls take; a quantised one of torchao has none of them."""
    is_wrapped = hasattr(tensor, "__tensor_flatten__") and hasattr(type(tensor), "dequantize")
    return tensor.dequantize() if is_wrapped else tensor


def _named_tensors(model, optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    names = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            names[id(param)] = name
            # ZeRO-3 keeps this rank's part of it there.
            yield name, getattr(param, "ds_tensor", param).detach()
    state = getattr(optimizer, "state", None)
    if not isinstance(state, Mapping):
        return
    for number, (key, values) in enumerate(state.items()):
        name = names.get(id(key), f"shard {number} of the float32 weights")
        if torch.is_tensor(key) and id(key) not in names:
            yield name, key.detach()
        for kind, value in values.items() if isinstance(values, Mapping) else ():
            if torch.is_tensor(value):
                yield f"{kind} of {name}", value
