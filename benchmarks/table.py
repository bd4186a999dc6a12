"""Turn the reports of the benchmarks into the project's table: measured figures with their gates and goals.

A cell without a report reads "not measured".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.annotations import NUM_RECORDS

NOT_MEASURED = "not measured"
STAGES = ("1", "2", "3")
BY_TORCH = "llava-lite, torch's matmul"


@dataclass(frozen=True)
class Row:
    """A line of the table. read: reports -> numbers; gate and goal: as many numbers; most: smaller is better."""

    name: str
    gate: tuple
    goal: tuple
    read: Callable[[dict], list]
    most: bool = False
    form: str = "{:.2f}"
    read_ranges: Callable[[dict], list] = lambda reports: []

    def ranges(self, reports: dict) -> list:
        """Return a range over the rounds for each cell, none where there are no rounds."""
        return self.read_ranges(reports) if "training" in reports else []

    def cells(self, reports: dict) -> list:
        """Return a number or None for each cell."""
        try:
            found = self.read(reports)
        except (KeyError, TypeError, IndexError):
            found = []
        return [*found, *[None] * (len(self.gate) - len(found))]

    def met(self, reports: dict, limits: tuple) -> bool | None:
        """Return whether every measured cell meets its limit, None if there is none."""
        pairs = [
            (cell, limit) for cell, limit in zip(self.cells(reports), limits, strict=True) if None not in (cell, limit)
        ]
        if not pairs:
            return None
        return all(cell <= limit if self.most else cell >= limit for cell, limit in pairs)

    def written(self, values) -> str:
        """Return numbers as a cell of the table."""
        if all(value is None for value in values):
            return "-"
        return " / ".join("-" if value is None else self.form.format(value) for value in values)


def dig(tree, *keys):
    """Return the value under nested `keys`, None where there is none."""
    for key in keys:
        if not isinstance(tree, dict) or key not in tree:
            return None
        tree = tree[key]
    return tree


def select_full_sizes(reports: dict) -> dict:
    """Return the reports without those of toy sizes or of fewer annotations."""
    kept = {}
    for name, report in reports.items():
        settings = report.get("settings", {})
        is_small = settings.get("num_records", NUM_RECORDS) != NUM_RECORDS
        if not (settings.get("quick") or settings.get("toy") or is_small):
            kept[name] = report
    return kept


def get_h200_results(reports: dict) -> dict:
    """Return the results of the GPU suite, none if it ran on another device."""
    report = reports["cuda_suite"]
    return report["results"] if "H200" in report["machine"]["device"] else {}


def read_stages(size: str, *keys):
    """Return a reader of the training report: a number (or a range) for each stage."""
    return lambda reports: [dig(reports["training"]["results"], size, stage, *keys) for stage in STAGES]


def speed_row(name: str, gate: tuple, goal: tuple, size: str, key: str) -> Row:
    """Return a row with a ratio of the training report, which has a range."""
    ranges = read_stages(size, key, "ratio_range")
    return Row(name, gate, goal, read_stages(size, key, "ratio"), read_ranges=ranges)


def read_mfu(reports: dict) -> list:
    """Return our MFU of the stages in percent."""
    found = []
    for stage in STAGES:
        part = dig(get_h200_results(reports), f"stage {stage}") or {}
        fraction = dig(part, "rivals", part.get("fastest_ours"), "mfu")
        found.append(None if fraction is None else 100 * fraction)
    return found


def moe_layer(reports: dict, on_gpu: bool, name: str = "llava-lite") -> list:
    """Return our speed over DeepSpeed's at capacity 1.5, for the least number of tokens."""
    results = get_h200_results(reports)["moe_layer"] if on_gpu else reports["moe_layer"]["results"]
    figures = results["training"]
    if not on_gpu and reports["moe_layer"]["machine"]["device"] != "cpu":
        return [None]
    ours = [figures[tokens][name] for tokens in sorted(figures, key=int)]
    return [one["ratio"] for one in ours if one["base"].startswith("deepspeed")][:1]


def generation(reports: dict, on_gpu: bool, name: str = "llava-lite") -> list:
    """Return our tokens per second over transformers': batch 1 and 8 on a CPU, batch 1 on a GPU."""
    if on_gpu:
        return [dig(get_h200_results(reports), "generation", "batch 1", name, "ratio")]
    report = reports["generation"]
    if report["machine"]["device"] != "cpu":
        return []
    return [dig(report["results"], f"batch {size}", name, "ratio") for size in (1, 8)]


def start_up(reports: dict) -> list:
    """Return CPU seconds of `import` and --help, and of a run's imports over those of torch and the Trainer."""
    found = reports["start_up"]["results"]
    seconds = [dig(found, name, "cpu_s") for name in ("import llava_lite", "llava-lite --help")]
    return [*seconds, dig(found, "imports of a training run", "of_trainer")]


def images(reports: dict, figure: str) -> list:
    """Return the ratio `figure` of exact and of fast images, 336 px and padded."""
    results = reports["images"]["results"]["336 px, pad"]
    return [dig(results, resize, figure) for resize in ("exact", "fast")]


def annotations(reports: dict) -> list:
    """Return seconds to open the index, MB of private memory and microseconds per record."""
    ours = reports["annotations"]["results"]["llava-lite"]
    return [ours["open_s"], ours["private_bytes_of_process"] / 1e6, ours["record_us"]]


SPEED = speed_row(
    "training tokens/s, CPU, stages 1 / 2 / 3, over the fastest run of transformers",
    (1.5, 1.5, 1.4),
    (1.8, 2.1, 1.85),
    "S",
    "over_transformers",
)
SPEED_BY_TORCH = speed_row(
    "the same with torch's own float32 matmul in ours too",
    (None, None, None),
    (None, None, None),
    "S",
    "over_transformers_by_torch_matmul",
)
SPEED_LIGHT_LOGITS = speed_row(
    "the same where the vocabulary head weighs as in a 7B model",
    (1.0, 1.1, 1.2),
    (1.15, 1.3, 1.4),
    "V",
    "over_transformers",
)
SPEED_OVER_LLAVA = speed_row(
    "the same over LLaVA's and MoE-LLaVA's own code, published flags",
    (2.0, 2.2, 2.7),
    (2.5, 2.8, 3.4),
    "S",
    "over_llava",
)
MEMORY = Row(
    "memory above the loaded model over transformers' leanest run without checkpointing",
    (0.75, 0.75, 0.75),
    (0.4, 0.5, 0.45),
    read_stages("S", "memory_fraction"),
    most=True,
)
IMAGES = Row(
    "images per CPU second, exact / fast, over LLaVA's own code",
    (2.5, 3.5),
    (None, 4.5),
    lambda reports: images(reports, "ratio_cpu_to_original"),
)
IMAGES_OVER_PROCESSOR = Row(
    "the same over its steps with transformers' processor of today",
    (None, None),
    (None, None),
    lambda reports: images(reports, "ratio_cpu"),
)
ANNOTATIONS = Row(
    "665k annotations: open warm, s / private memory per process, MB / per record, us",
    (0.5, 50, 25),
    (0.2, 15, 16),
    annotations,
    most=True,
    form="{:.3g}",
)
CHECK = Row(
    "check of 100k image files that were checked before, files/s",
    (20_000,),
    (35_000,),
    lambda reports: [reports["check"]["results"]["llava-lite"]["rate"]],
    form="{:,.0f}",
)
ROWS = [
    SPEED,
    SPEED_BY_TORCH,
    SPEED_LIGHT_LOGITS,
    SPEED_OVER_LLAVA,
    MEMORY,
    Row(
        "MoE layer, forward and backward, CPU, over DeepSpeed at capacity 1.5",
        (1.3,),
        (1.5,),
        lambda reports: moe_layer(reports, on_gpu=False),
    ),
    Row(
        "MoE layer with torch's own float32 matmul in ours too",
        (None,),
        (None,),
        lambda reports: moe_layer(reports, on_gpu=False, name=BY_TORCH),
    ),
    Row(
        "H200, 7B widths, MFU of stages 1 / 2 / 3 (computed), %",
        (45, 42, 38),
        (55, 50, 45),
        read_mfu,
        form="{:.1f}",
    ),
    Row(
        "H200, MoE layer at 6k tokens, over DeepSpeed",
        (2.0,),
        (2.6,),
        lambda reports: moe_layer(reports, on_gpu=True),
    ),
    Row(
        "generation tokens/s, CPU, batch 1 / 8, over transformers",
        (None, None),
        (None, None),
        lambda reports: generation(reports, on_gpu=False),
    ),
    Row(
        "generation with torch's own float32 matmul in ours too",
        (None, None),
        (None, None),
        lambda reports: generation(reports, on_gpu=False, name=BY_TORCH),
    ),
    Row(
        "H200 generation, 7B widths, batch 1, over transformers",
        (None,),
        (None,),
        lambda reports: generation(reports, on_gpu=True),
    ),
    IMAGES,
    IMAGES_OVER_PROCESSOR,
    ANNOTATIONS,
    CHECK,
    Row(
        "CPU s of `import llava_lite` / `--help`; a run's imports over torch and Trainer",
        (0.1, 0.3, 1.3),
        (None, None, 1.1),
        start_up,
        most=True,
    ),
]


def table(reports: dict, rows=None) -> list[list[str]]:
    """Return the table as lines of text: name, gate, goal, measured, verdict; the first is its head."""
    lines, reports = [["", "gate", "goal", "measured", ""]], select_full_sizes(reports)
    for row in ROWS if rows is None else rows:
        gate, goal = row.met(reports, row.gate), row.met(reports, row.goal)
        cells = row.cells(reports)
        verdict = "" if gate is None else "GATE MISSED" if not gate else "goal met" if goal else "gate met"
        if verdict and None in cells:
            verdict += " where measured"
        measured = row.written(cells) if any(cell is not None for cell in cells) else NOT_MEASURED
        lines.append([row.name, row.written(row.gate), row.written(row.goal), measured, verdict])
    return lines


def as_text(lines: list[list[str]]) -> str:
    """Return a table in columns."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def as_markdown(lines: list[list[str]]) -> str:
    """Return a table in Markdown."""
    head, *rest = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rest])
