"""Turn the reports of the benchmarks into the page RESULTS.md and its plot."""

from __future__ import annotations

from pathlib import Path

from benchmarks import table as lines_of_table
from benchmarks.details import detail_parts
from benchmarks.table import STAGES, as_markdown, dig, table

PAGE, PLOT = "RESULTS.md", "results.png"
HEAD = """# What was measured

Written by `python -m benchmarks` from the reports of its runs; nothing is taken from elsewhere. "Not measured" stands
where the machine or the other code was not available. Each line of the list below names the processor with the vector
width that torch uses on it: with AVX2 other parts gain than with AVX512.

- A ratio is how many times as fast: above 1, llava-lite or the runner of the row needs less time than what it is
  compared with. It is the ratio of the two medians over the rounds; its range is that of the ratios within a round.
- In training, generation and start-up each runner works alone in its own process, as a user runs it, and the processes
  of a round follow each other in random order. In training and generation a process warms up before it is timed. In
  the first round of training all of transformers' runs take part, in the others the two fastest. The runners of the
  MoE layer, of images and of the ablation take turns in one process.
- "Over itself" is one runner that is called twice a round: how far from 1 a ratio may lie by chance.
- Stage 1 trains the connector, stage 2 connector and language model, stage 3 connector and MLPs; every second MLP is a
  layer of experts.
- Size S is a small model with AdamW. Its vocabulary head is a far larger fraction of the decoder than in a 7B model.
  In size V the head is 2%, as in a 7B model; the optimizer is SGD, because Adam's pass over the weights would take too
  large a fraction of a step with so few tokens.
- "transformers" is Hugging Face's LlavaForConditionalGeneration in a plain loop, "transformers Trainer" the same in
  its Trainer, "+ckpt" with gradient checkpointing. LLaVA is its own code with gradient checkpointing, as in its
  scripts.
- "Above the loaded model" is the peak memory of a run minus what it holds before the first step. Memory fractions
  divide the medians of two runs.
- A gate must be reached, a goal is desirable; "-" stands where there is none.
- MFU is computed: measured tokens per second times the flops of a step per token, over the peak of the device. The
  rivals of the GPU suite run one after another.
"""
SPEED_AXIS, FRACTION_AXIS = "times as fast, more is better", "fraction, less is better"


def write_page(reports: dict, directory: Path) -> list[str]:
    """Write the page and, where there is something to draw, the plot; return their paths."""
    drawn = draw(reports, directory / PLOT)
    parts = [HEAD, machine_lines(reports), as_markdown(table(reports))]
    parts += [f"![ratios, memory and ablation]({PLOT})"] if drawn else []
    parts += [*training_parts(reports), *ablation_parts(reports), *detail_parts(reports), *suite_parts(reports)]
    page = directory / PAGE
    page.write_text("\n\n".join(part.strip() for part in parts if part) + "\n", encoding="utf-8")
    return [str(page), *([str(directory / PLOT)] if drawn else [])]


def machine_lines(reports: dict) -> str:
    """Return a line for each report: date, machine and versions."""
    lines = []
    for name, report in reports.items():
        machine = report["machine"]
        versions = ", ".join(f"{library} {version}" for library, version in machine["versions"].items())
        where = f"{machine['processor']} ({machine['vector_width']}), {machine['num_cores']} cores, "
        where += f"{machine['num_threads']} threads"
        where += "" if machine["device"] == "cpu" else f", {machine['device']}"
        lines.append(
            f"- {name}: {machine['date']}, {where}; Python {machine['python']}, {versions}; {machine['commit']}"
        )
    return "\n".join(lines)


def training_parts(reports: dict) -> list[str]:
    """Return a table of the rivals for each size and stage."""
    parts = ["## Training"] if "training" in reports else []
    for size, stages in (dig(reports, "training", "results") or {}).items():
        for stage, result in stages.items():
            lines = [["", "tokens/s", "CPU s / 1000 tokens", "ratio", "range", "MiB above loaded model"]]
            for name, one in result["rivals"].items():
                low, high = one["ratio_range"]
                memory = f"{one['above_loaded_bytes'] / 2**20:.0f}"
                numbers = [f"{one['rate']:.0f}", f"{1000 * one['cpu_s_per_unit']:.2f}", f"{one['ratio']:.2f}"]
                lines.append([name, *numbers, f"{low:.2f}-{high:.2f}", memory])
            parts += [f"### Size {size}, stage {stage}", about_batches(result, stage), as_markdown(lines)]
    return parts


def about_batches(result: dict, stage: str) -> str:
    """Return what the batches of a size and stage hold, and how far from 1 ours is over itself."""
    batches = result["batches"]
    ours = result["over_transformers"]
    low, high = ours["self_range"]
    return (
        f"{batches['samples_per_step']} samples and {batches['tokens_per_step']:.0f} tokens per step, "
        f"{100 * batches['supervised_fraction']:.0f}% of them supervised; padding of runs that do not pack "
        f"{100 * batches['padding_fraction']:.0f}%; the vocabulary head is {100 * batches['logits_fraction']:.1f}% of "
        f"the decoder's weights that multiply a token; {batches['optimizer']}. "
        f"Ours over itself: {ours['self_ratio']:.2f}, {low:.2f}-{high:.2f}. "
        f"Losses within {result['largest_loss_difference']:.0e} of ours"
        + (", without the balance loss, which transformers' model leaves out." if stage == "3" else ".")
    )


WHAT_IS_OFF = (
    "Each row switches one path to its plain form. Loss: the logits of all positions, then cross-entropy. Experts: "
    "transformers' function for experts. Packing: padded sequences. Matmul: torch's own. Gradient checkpointing and "
    "the feature cache are off in all other rows."
)


def ablation_parts(reports: dict) -> list[str]:
    """Return the table of what each path gains."""
    results = dig(reports, "ablation", "results") or {}
    parts = ["## What each path gains", WHAT_IS_OFF] if results else []
    for size, stages in results.items():
        names = variant_names(stages)
        lines = [["", *(f"stage {stage}" for stage in stages)]]
        for name in names:
            times = [dig(one, "variants", name, "relative_time") for one in stages.values()]
            lines.append([name, *("-" if time is None else f"{time:.2f}" for time in times)])
        ranges = [one["variants"]["all on"]["self_range"] for one in stages.values()]
        own = ", ".join(f"{low:.2f}-{high:.2f}" for low, high in ranges)
        parts += [
            f"Time of a step over that with all on, size {size} (all on over itself: {own}).",
            as_markdown(lines),
        ]
    return parts


def variant_names(stages: dict) -> list[str]:
    """Return the variants of all stages in the order of the stage that has most."""
    longest = sorted(stages.values(), key=lambda one: -len(one["variants"]))
    return list(dict.fromkeys(name for one in longest for name in one["variants"]))


def suite_parts(reports: dict) -> list[str]:
    """Return the tables of the GPU suite."""
    results = dig(reports, "cuda_suite", "results") or {}
    parts = ["## One GPU, 7B widths"] if results else []
    for stage in STAGES:
        part = results.get(f"stage {stage}", {})
        lines = [["", "tokens/s", "MFU (computed), %", "peak GiB"]]
        for name, one in part.get("rivals", {}).items():
            if "tokens_per_s" not in one:
                lines.append([name, next(iter(one)).replace("_", " "), "-", "-"])
                continue
            peak = f"{one['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in one else "-"
            lines.append([name, f"{one['tokens_per_s']:.0f}", f"{100 * one['mfu']:.1f}", peak])
        if len(lines) > 1:
            parts += [f"### Stage {stage}", as_markdown(lines)]
    return parts


def draw(reports: dict, file: Path) -> bool:
    """Draw ratios with their gates, memory, and the ablation; return whether there was anything to draw."""
    if not {"training", "ablation"} & set(reports):
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = dig(reports, "ablation", "results") or {}
    widths = (3, 2, 4) if results else (3, 2)
    # Three plots, or two where there is no ablation.
    figure, (speed, memory, *items) = pyplot.subplots(
        1, len(widths), figsize=(1.7 * sum(widths), 5), width_ratios=widths, layout="constrained"
    )
    shown = [
        (lines_of_table.SPEED, "size S"),
        (lines_of_table.SPEED_BY_TORCH, "size S, torch's matmul"),
        (lines_of_table.SPEED_LIGHT_LOGITS, "size V, head as in 7B"),
        (lines_of_table.SPEED_OVER_LLAVA, "size S, over LLaVA's code"),
    ]
    bars(speed, reports, [pair for pair in shown if any(pair[0].cells(reports))], SPEED_AXIS)
    speed.set_title("Training speed over transformers' fastest run")
    bars(memory, reports, [(lines_of_table.MEMORY, "size S")], FRACTION_AXIS)
    memory.set_title("Memory over transformers' leanest run")
    for axes in items:
        draw_ablation(axes, results)
        axes.set_title("Step without a path over the step with all")
        axes.set_xlabel("times as long; more: the path gains more")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return True


def bars(axes, reports: dict, shown: list, unit: str) -> None:
    """Draw a group of bars for each stage with the ranges of their rounds, and a line at each gate and goal."""
    width = 0.8 / max(len(shown), 1)
    for place, (row, label) in enumerate(shown):
        cells = row.cells(reports)
        at = [stage + (place - (len(shown) - 1) / 2) * width for stage in range(len(cells))]
        axes.bar(at, [cell or 0 for cell in cells], width * 0.9, label=label, color=f"C{place}")
        # At the foot of the bar, below lines and ranges.
        for x, cell in zip(at, cells, strict=True):
            text = "" if cell is None else f"{cell:.2f}"
            axes.annotate(text, (x, 0), (0, 4), textcoords="offset points", ha="center", color="white", fontsize=8)
        for x, cell, ends in zip(at, cells, row.ranges(reports), strict=False):
            if None not in (cell, ends):
                axes.vlines(x + width * 0.3, *ends, color="black", linewidth=0.8)
        for limits, style, name in ((row.gate, "k-", "gate"), (row.goal, "k:", "goal")):
            for x, limit, cell in zip(at, limits, cells, strict=True):
                if None not in (cell, limit):
                    first = place == 0 and x == at[0]
                    ends = [x - width * 0.45, x + width * 0.45]
                    axes.plot(ends, [limit, limit], style, linewidth=1.2, label=name if first else None)
    axes.axhline(1, color="grey", linewidth=0.6)
    axes.set_ylabel(unit)
    axes.set_xticks(range(len(STAGES)), [f"stage {stage}" for stage in STAGES])
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2)


def draw_ablation(axes, results: dict) -> None:
    """Draw for each path and stage the time without it over the time with all."""
    stages = next(iter(results.values()), {})
    names = [name for name in variant_names(stages) if name != "all on"]
    height = 0.8 / max(len(stages), 1)
    for place, (stage, one) in enumerate(stages.items()):
        shown = [(y, dig(one, "variants", name, "relative_time")) for y, name in enumerate(names)]
        shown = [(y + (place - 1) * height, time) for y, time in shown if time is not None]
        axes.barh([y for y, _ in shown], [time - 1 for _, time in shown], height * 0.9, left=1, label=f"stage {stage}")
        for y, name in enumerate(names):
            ends = dig(one, "variants", name, "ratio_range")
            if ends is not None:
                axes.hlines(y + (place - 1) * height, *(1 / end for end in ends), color="black", linewidth=0.8)
    axes.axvline(1, color="grey", linewidth=0.6)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    if names:
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
