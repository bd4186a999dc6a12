"""Keep what a tensor was made of in place of the tensor, and make it again when its gradient is wanted.

For what costs a pass over memory to make and as much room as a product's input: the activation in front of an MLP's
last weight (Chen et al. 2016, arXiv 1604.06174, for one step in place of a whole layer).
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.autograd.graph import saved_tensors_hooks

# Private: the hooks of a checkpoint, an offload or whoever else keeps the tensors of this pass, or None.
_hooks_around = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def remade(made: torch.Tensor, make, *inputs):
    """Return a context in which whoever keeps `made` keeps `inputs` of `make(*inputs) == made` in place of it.

    made: contiguous; views of the whole of it are known as well. A checkpoint or an offload around it is given the
    inputs to keep; an offload copies them once more.
    """
    if not torch.is_grad_enabled() or _hooks_around is None or not made.is_contiguous():
        return nullcontext()
    return _remaking(made, make, list(inputs))


@contextmanager
def _remaking(made, make, inputs):
    pack_around, unpack_around = _hooks_around(True) or (_without_history, _same)
    home, size = made.untyped_storage().data_ptr(), made.numel()

    def pack(tensor):
        is_made = tensor.untyped_storage().data_ptr() == home and tensor.numel() == size and tensor.is_contiguous()
        if not is_made:
            return None, pack_around(tensor)
        return tensor.shape, [pack_around(one.detach()) for one in inputs]

    def unpack(packed):
        shape, kept = packed
        if shape is None:
            return unpack_around(kept)
        with torch.no_grad():
            return make(*(unpack_around(one) for one in kept)).view(shape)

    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        # Autograd keeps `pack` as long as what it packed: a checkpoint around it would not get rid of the inputs.
        inputs.clear()


def _without_history(tensor):
    # A parameter as itself, for ZeRO-3; an output with its history would be a circle that nobody frees.
    return tensor if tensor.is_leaf else tensor.detach()


def _same(tensor):
    return tensor
