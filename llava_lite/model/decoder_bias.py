"""Give linear layers of a decoder a bias that its architecture does not have (LLaMA-Adapter V2, arXiv 2304.15010)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def add_biases(layers: nn.ModuleList, names: Iterable[str]) -> None:
    """Add a bias of zeros to each linear layer of these names in the layers; one that has a bias keeps it.

    Raises ValueError with the linear layers that there are if a name is none of them.
    """
    names = set(names)
    known = set()
    for layer in layers:
        for name, module in layer.named_modules():
            own = name.rpartition(".")[2]
            if not isinstance(module, nn.Linear):
                continue
            known.add(own)
            if own in names and module.bias is None:
                module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))
    if names - known:
        raise ValueError(
            f"decoder_bias names {', '.join(sorted(names - known))}; the linear layers of this decoder are "
            f"{', '.join(sorted(known))}."
        )


def is_added_bias(name: str, names: Iterable[str]) -> bool:
    """Return whether a weight of this name is a bias that `add_biases` has added for these linear layers."""
    parts = name.split(".")
    return parts[:2] == ["model", "layers"] and parts[-1] == "bias" and parts[-2] in set(names)
