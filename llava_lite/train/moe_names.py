"""Find our parameters by the names that MoE-LLaVA gives them, which `--train_modules` is written in."""

import re
from collections.abc import Iterable, Mapping

# The last part of our fused expert weights -> the layers of one expert in MoE-LLaVA: gated MLPs, then Phi's.
GATED = {"gate_up_proj": ("gate_proj.weight", "up_proj.weight"), "down_proj": ("down_proj.weight",)}
UNGATED = {
    "up_proj": ("fc1.weight",),
    "up_proj_bias": ("fc1.bias",),
    "down_proj": ("fc2.weight",),
    "down_proj_bias": ("fc2.bias",),
}
LAYER = re.compile(r"\.layers\.(\d+)\.mlp\.")


def moe_llava_names(name, num_experts: Mapping[int, int], gated=True) -> list[str]:
    """Return the names that MoE-LLaVA has for our parameter `name`: several for a fused one.

    num_experts: experts by layer index; a parameter of another layer, or outside the MLPs, keeps its name.
    """
    found = LAYER.search(name)
    if found is None or int(found[1]) not in num_experts:
        return [name]
    head, leaf = name[: found.end()], name[found.end() :]
    if leaf == "gate.weight":
        return [f"{head}deepspeed_moe.gate.wg.weight"]
    if not leaf.startswith("experts."):
        return [name]
    layers = (GATED if gated else UNGATED)[leaf.removeprefix("experts.")]
    experts = f"{head}deepspeed_moe.experts.deepspeed_experts"
    return [f"{experts}.{e}.{layer}" for e in range(num_experts[int(found[1])]) for layer in layers]


def match_train_modules(
    names: Iterable[str], entries: Iterable[str] | None, num_experts: Mapping[int, int]
) -> list[str]:
    """Return those of our parameter `names` whose name in MoE-LLaVA contains one of `entries`; None: all MLPs.

    Raises ValueError for an entry that is part of no name, and for entries that take a part of a fused weight only.
    """
    names = list(names)
    if entries is None:
        return [name for name in names if ".mlp." in name]
    gated = any(name.endswith(".mlp.experts.gate_up_proj") for name in names)
    theirs = {name: moe_llava_names(name, num_experts, gated) for name in names}
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
