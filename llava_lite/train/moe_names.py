"""Find our parameters by the names that MoE-LLaVA gives them, which `--train_modules` is written in."""

import re
from collections.abc import Iterable, Mapping

from llava_lite.formats.moe_llava import moe_llava_names

LAYER = re.compile(r"\.layers\.(\d+)\.")


def layer_of(name):
    """Return the layer that a parameter of this name belongs to, None for one outside the layers."""
    found = LAYER.search(name)
    return None if found is None else int(found[1])


def match_train_modules(
    names: Iterable[str], entries: Iterable[str] | None, num_experts: Mapping[int, int]
) -> list[str]:
    """Return those of our parameter `names` whose name in MoE-LLaVA contains one of `entries`; None: all MLPs.

    num_experts: experts by layer index. Raises ValueError for an entry that is part of no name, and for entries that
    take a part of a fused weight only.
    """
    names = list(names)
    if entries is None:
        return [name for name in names if ".mlp." in name]
    gated = any(name.endswith(".mlp.experts.gate_up_proj") for name in names)
    theirs = {name: moe_llava_names(name, num_experts.get(layer_of(name), 1), gated) for name in names}
    for entry in entries:
        if not any(entry in alias for aliases in theirs.values() for alias in aliases):
            known = sorted({alias.split(".")[-2] for aliases in theirs.values() for alias in aliases})
            raise ValueError(
                f"--train_modules {entry} trains nothing: no parameter is named so; known: {', '.join(known)}."
            )
    return [name for name, aliases in theirs.items() if takes_all(name, aliases, list(entries))]


def takes_all(name, aliases, entries):
    """Whether `entries` match every one of `aliases`, False if they match none; raises ValueError for some."""
    matched = [alias for alias in aliases if any(entry in alias for entry in entries)]
    if matched and len(matched) < len(aliases):
        missed = next(alias for alias in aliases if alias not in matched)
        raise ValueError(
            f"--train_modules {' '.join(entries)} names {matched[0]} but not {missed}, and {name} holds both as one "
            "weight. Name both or neither."
        )
    return bool(matched)
