"""Find weights and optimizer state that are not finite, with few fused calls."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch.nn.utils import get_total_norm

from llava_lite.checkpoints.copying import own_part


class NonFiniteError(RuntimeError):
    """A loss, a gradient, a weight or optimizer state is not finite.

    Every rank raises it with the same message.
    """

    # See train/startup.py.
    reported_by_first_of = "RANK"


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


def find_in_each(named: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> list[str]:
    """Return the names of the tensors with a number that is not finite in `dtype`, such as 70,000 in float16.

    Looks at one after the other, in one pass that needs no memory beside it, where `find_in` takes all together.
    Tensors of whole numbers, such as quantised weights, and those that are not in memory are left out.
    """
    ends = [
        (name, torch.stack(torch.aminmax(_wide_enough(tensor.detach()))).to(dtype))
        for name, tensor in named
        if tensor.is_floating_point() and tensor.numel() > 0 and not tensor.is_meta
    ]
    # An end is NaN if any number is.
    return [name for name, pair in ends if not bool(pair.isfinite().all())]


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


def _wide_enough(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that torch can compare: in 8 bits it can only convert."""
    plain = _as_plain(tensor)
    return plain.to(torch.bfloat16) if plain.element_size() == 1 else plain


def _named_tensors(model, optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    names = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            names[id(param)] = name
            yield name, own_part(param).detach()
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
