"""What papers and model cards report for LLaVA-1.5, MoE-LLaVA and TinyLLaVA, to stand beside what is measured."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """A figure that others report: model, figure, where."""

    model: str
    score: float
    source: str


ZOO = "LLaVA's model zoo"
MOE = "MoE-LLaVA, README"
FLAGPERF = "FlagPerf, README of llava1.5_7b and 13b"
# Order of the figures below; MME is perception, SQA the part with images.
ORDER = [
    "vqav2",
    "gqa",
    "vizwiz",
    "sqa",
    "textvqa",
    "pope",
    "mme",
    "mmbench",
    "mmbench_cn",
    "seed",
    "llavabench",
    "mmvet",
]
LLAVA = {
    "LLaVA-1.5 7B": (78.5, 62.0, 50.0, 66.8, 58.2, 85.9, 1510.7, 64.3, 58.3, 58.6, 65.4, 31.1),
    "LLaVA-1.5 13B": (80.0, 63.3, 53.6, 71.6, 61.3, 85.9, 1531.3, 67.7, 63.6, 61.6, 72.5, 36.1),
    "LLaVA-1.5 7B LoRA": (79.1, 63.0, 47.8, 68.4, 58.2, 86.4, 1476.9, 66.1, 58.9, 60.1, 67.9, 30.2),
    "LLaVA-1.5 13B LoRA": (80.0, 63.3, 58.9, 71.2, 60.2, 86.7, 1541.7, 68.5, 61.5, 61.3, 69.5, 38.3),
}
MOE_ORDER = (*ORDER[:8], "mmvet")
MOE_LLAVA = {
    "MoE-LLaVA StableLM 1.6Bx4": (76.7, 60.3, 36.2, 62.6, 50.1, 85.7, 1318.1, 60.2, 26.9),
    "MoE-LLaVA Qwen 1.8Bx4": (76.2, 61.5, 32.6, 63.1, 48.0, 87.0, 1291.6, 59.6, 25.3),
    "MoE-LLaVA Phi2 2.7Bx4": (77.6, 61.4, 43.9, 68.5, 51.4, 86.3, 1423.0, 65.2, 34.3),
    "MoE-LLaVA StableLM 1.6Bx4-384": (78.6, 61.5, 40.5, 63.9, 54.3, 85.9, 1335.7, 63.3, 32.3),
    "MoE-LLaVA Phi2 2.7Bx4-384": (79.9, 62.6, 43.7, 70.3, 57.0, 85.7, 1431.3, 68.0, 35.9),
}
OTHERS = {
    "mmmu": [Published("LLaVA-1.5 7B", 35.9, FLAGPERF), Published("LLaVA-1.5 13B", 36.2, FLAGPERF)],
}
# Questions of a complete benchmark, rounded down since releases differ: the figures above are of all of them.
COMPLETE = {"vqav2": 100_000, "gqa": 12_000, "vizwiz": 4_000, "sqa": 2_000, "textvqa": 5_000, "pope": 8_900}
COMPLETE |= {"mme": 2_300, "mmbench": 4_000, "mmbench_cn": 4_000, "seed": 14_000, "llavabench": 60, "mmvet": 200}
COMPLETE |= {"mmmu": 900}


def published(name: str) -> list[Published]:
    """Return what others report for a benchmark; an empty list where nothing is known."""
    found = list(OTHERS.get(name, []))
    for order, models, source in ((ORDER, LLAVA, ZOO), (MOE_ORDER, MOE_LLAVA, MOE)):
        if name in order:
            found += [Published(model, figures[order.index(name)], source) for model, figures in models.items()]
    return found


def why_not_beside(name: str, num_questions: int) -> str | None:
    """Return why the figures of others do not stand beside a score of so many questions; None where they may."""
    if num_questions >= COMPLETE.get(name, 0):
        return None
    return (
        f"The figures of others are left out: theirs are of the complete benchmark, at least {COMPLETE[name]:,} "
        f"questions, and this score is of {num_questions:,}."
    )
