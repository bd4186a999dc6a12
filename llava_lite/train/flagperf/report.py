"""Turn the times and tokens of both stages into FlagPerf's printed lines, and into ours beside them.

FlagPerf counts padding as tokens, the time of the complete process, and flops of 2 P a token in stage 1, where
gradients pass through the frozen language model (4 P), and of 6 P in stage 2. Ours counts real tokens and the time of
the steps. P parameters. FlagPerf multiplies by fixed numbers of records (558,128 and 665,344); here they are counted,
with those that fill the last batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava_lite.train.monitor.throughput import mfu

PARAMETERS = {"7b": 7e9, "13b": 13e9}
THEIR_FACTORS, OUR_FACTORS = (2, 6), (4, 6)
# Of 8 A800 with 80 GB, 312 TFLOPS each: size -> tokens a second and chip of both stages, MFU of both (FlagPerf counts
# it so), MMMU; README of training/benchmarks/llava1.5_7b and 13b.
PUBLISHED = {"7b": (4013.0, 2937.0, 0.1801, 0.3957, 0.359), "13b": (2273.54, 1622.90, 0.1895, 0.4057, 0.362)}


@dataclass(frozen=True)
class Stage:
    """What a stage took.

    seconds: of the complete process. records, tokens, padded_tokens: trained on by all chips together; padded: as if
    the records of each micro-batch were padded to the longest. step_seconds: of the training steps alone.
    """

    seconds: float
    records: int
    tokens: int
    padded_tokens: int
    step_seconds: float

    @property
    def tokens_of_a_record(self) -> float:
        """FlagPerf's `tokens`: positions of a record, padding and image tokens counted."""
        return self.padded_tokens / self.records


@dataclass(frozen=True)
class Case:
    """Both stages and MMMU of a run. parameters: P of FlagPerf's formulas. counted: those of the trained model."""

    size: str
    theoryflops: float
    num_chips: int
    stages: tuple[Stage, Stage]
    counted: int
    mmmu: float | None = None

    @property
    def parameters(self) -> float:
        """Return FlagPerf's P."""
        return PARAMETERS[self.size]


def their_figures(case: Case) -> dict[str, float]:
    """Return FlagPerf's figures by its formulas."""
    figures, flops = {}, 0.0
    for name, stage, factor in zip(("pretrain", "finetune"), case.stages, THEIR_FACTORS, strict=True):
        system = stage.padded_tokens / stage.seconds
        chip = system / case.num_chips
        figures |= {f"{name}_system_tokens_per_s": system, f"{name}_tokens_per_s": chip}
        figures[f"{name}_tokens_per_tflops"] = chip / int(case.theoryflops / 1e12) if case.theoryflops >= 1e12 else 0.0
        figures[f"{name}_mfu"] = mfu(chip, factor * case.parameters, case.theoryflops)
        flops += stage.padded_tokens * factor * case.parameters
    seconds = sum(stage.seconds for stage in case.stages)
    figures["mfu"] = flops / seconds / case.num_chips / case.theoryflops
    figures["computing_power_tflops"] = figures["mfu"] * int(case.theoryflops / 1e12)
    return figures


def our_figures(case: Case) -> dict[str, float]:
    """Return tokens a second of a chip and MFU from real tokens, the time of steps, and the model's own parameters."""
    figures = {}
    for name, stage, factor in zip(("pretrain", "finetune"), case.stages, OUR_FACTORS, strict=True):
        chip = stage.tokens / stage.step_seconds / case.num_chips
        figures[f"{name}_tokens_per_s"] = chip
        figures[f"{name}_mfu"] = mfu(chip, factor * case.counted, case.theoryflops)
    return figures


def their_lines(case: Case) -> list[str]:
    """Return what FlagPerf's run_pretraining.py prints, in its order and words."""
    figures, lines = their_figures(case), []
    for name, stage in zip(("pretrain", "finetune"), case.stages, strict=True):
        lines += [f"{name} time is {stage.seconds}", f"tokens_{name} is {stage.tokens_of_a_record}"]
    if case.mmmu is not None:
        lines.append(f"MMMU : {case.mmmu:.3f}")
    for name, title in (("pretrain", "Pretrain stage"), ("finetune", "Finetune stage")):
        lines += [
            title,
            f"System tokens per second:  {figures[f'{name}_system_tokens_per_s']}",
            f"Tokens/p/s:  {figures[f'{name}_tokens_per_s']}",
            f"Theory TFLOPS:  {int(case.theoryflops / 1e12)}",
            f"Tokens/TFLOPS:  {figures[f'{name}_tokens_per_tflops']}",
            f"MFU:  {figures[f'{name}_mfu']}",
        ]
    return [
        *lines,
        "two-stage average",
        f"MFU:  {figures['mfu']}",
        f"Actual computing power:  {figures['computing_power_tflops']}",
    ]


def table(case: Case) -> list[str]:
    """Return a table of FlagPerf's figures of this run, ours, and the published ones of 8 A800."""
    theirs, ours, published = their_figures(case), our_figures(case), PUBLISHED[case.size]
    rows = [("", "as FlagPerf counts", "real tokens, steps alone", "published, 8 A800")]
    for name, title, tokens, their_mfu in (
        ("pretrain", "stage 1", published[0], published[2]),
        ("finetune", "stage 2", published[1], published[3]),
    ):
        rows.append(
            (f"{title}, tokens/s a chip", theirs[f"{name}_tokens_per_s"], ours[f"{name}_tokens_per_s"], tokens)
        )
        percent = [100 * value for value in (theirs[f"{name}_mfu"], ours[f"{name}_mfu"], their_mfu)]
        rows.append((f"{title}, MFU, %", *percent))
    found = "not measured" if case.mmmu is None else 100 * case.mmmu
    rows.append(("MMMU, %", found, found, 100 * published[4]))
    cells = [[cell if isinstance(cell, str) else f"{cell:,.4g}" for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
