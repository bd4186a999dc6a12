"""Join what model parallelism cut apart (consolidated.NN.pth, one file a rank), and add a delta to its base.

Meta's LLaMA and LLaMA2-Accessory cut the same weights along the same dimensions; what is not named here is in every
file, complete.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

import torch

logger = logging.getLogger(__name__)

# Linear layer -> the dimension along which each of its weights is cut. A bias of wo and w2 is added after the sum.
COLUMN = {"weight": 0, "bias": 0, "lora_b.weight": 0}
ROW = {"weight": 1, "lora_a.weight": 1}
CUTS = dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), COLUMN)
CUTS |= dict.fromkeys(("wo", "w2"), ROW) | {"tok_embeddings": {"weight": 1}}
_CUT = re.compile(
    r"(?:llma\.|llama\.)?(?:layers\.\d+\.(?:attention|feed_forward)\.)?(?P<linear>w[qkvo123]|output|tok_embeddings)\."
    r"(?P<weight>weight|bias|lora_[ab]\.weight)"
)
_PREFIX_GATE = re.compile(r"(?:llma\.)?prefix_gate")


def cut_dimension(name: str) -> int | None:
    """Return the dimension along which a weight of Meta's layout is cut, None for one that every file holds."""
    if _PREFIX_GATE.fullmatch(name):
        # Accessory's gates [layers, heads]. Its own merging does not know them and takes the heads of rank 0.
        return 1
    match = _CUT.fullmatch(name)
    return None if match is None else CUTS[match["linear"]].get(match["weight"])


def merge_shards(states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return one state dict of those of all ranks, in the order of the ranks; that of a single rank as it is.

    Raises ValueError for a weight that not all ranks have, and for one whose shapes do not go together.
    """
    if not states:
        raise ValueError("no consolidated file to merge; give the state dict of each.")
    names = set(states[0])
    for rank, state in enumerate(states):
        different = sorted(names ^ set(state))
        if different:
            raise ValueError(
                f"the files of rank 0 and of rank {rank} do not hold the same weights: {different[:4]} "
                f"({len(different)} in all) are in one of them only. Give the files of one checkpoint."
            )
    if len(states) == 1:
        return dict(states[0])
    embeds_by_rows = _cut_by_rows(states[0])
    return {name: _join(name, [state[name] for state in states], embeds_by_rows) for name in states[0]}


def _cut_by_rows(state) -> bool:
    """Tell whether the embeddings are cut along the vocabulary, as Llama 3's; their width is that of the norm then."""
    prefixes = [prefix for prefix in ("", "llma.", "llama.") if f"{prefix}norm.weight" in state]
    return any(state[f"{p}tok_embeddings.weight"].shape[1] == len(state[f"{p}norm.weight"]) for p in prefixes)


def _join(name, parts, embeds_by_rows):
    dimension = cut_dimension(name)
    if embeds_by_rows and name.endswith("tok_embeddings.weight"):
        dimension = 0
    uncut = [tuple(size for axis, size in enumerate(part.shape) if axis != dimension) for part in parts]
    if len(set(uncut)) > 1:
        raise ValueError(
            f"{name} has shapes {[tuple(part.shape) for part in parts]} in the files of the ranks, which do not go "
            "together. Give the files of one checkpoint."
        )
    if dimension is not None:
        return torch.cat(parts, dim=dimension)
    if any(not torch.equal(parts[0], part) for part in parts[1:]):
        logger.warning("%s should be the same in the files of all ranks and is not; that of rank 0 is read.", name)
    return parts[0]


def apply_delta(base: Mapping[str, torch.Tensor], delta: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return base + delta of every weight, summed in float32 and rounded to float16, as Open-Chinese-LLaMA says.

    Tables of rotary frequencies ("rope" in the name) are left out on both sides. Raises ValueError with the names of
    weights that only one side has, and with both shapes where they differ.
    """
    base = {name: tensor for name, tensor in base.items() if "rope" not in name}
    delta = {name: tensor for name, tensor in delta.items() if "rope" not in name}
    alone = sorted(set(base) - set(delta)), sorted(set(delta) - set(base))
    if any(alone):
        raise ValueError(
            f"base and delta do not hold the same weights: {alone[0][:4]} ({len(alone[0])} in all) are in the base "
            f"only, {alone[1][:4]} ({len(alone[1])} in all) in the delta only. Give both in one layout, of one model."
        )
    for name, tensor in base.items():
        if tensor.shape != delta[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in the base and {tuple(delta[name].shape)} in the delta. The "
                "delta was made for another model size or vocabulary."
            )
    return {name: (tensor.float() + delta[name].float()).half() for name, tensor in base.items()}


def add_difference(
    base: Mapping[str, torch.Tensor], difference: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return LLaMA2-Accessory's base with a `model-diff` on top, in the base's precision.

    A weight that both have is their sum; one that only the difference has is new. Raises ValueError with both shapes
    where they differ.
    """
    summed = dict(base)
    for name, tensor in difference.items():
        if name in base and base[name].shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {tuple(base[name].shape)} in the base and {tuple(tensor.shape)} in the difference. "
                "The difference was made for another model size or vocabulary."
            )
        summed[name] = base[name] + tensor.to(base[name].dtype) if name in base else tensor
    return summed
