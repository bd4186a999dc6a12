"""Turn the reports of the smaller benchmarks into the tables of RESULTS.md, with a line for each rival."""

from __future__ import annotations

from benchmarks.table import as_markdown, dig

# Columns of a table: head, key of a rival's figures, factor, form.
RATIO = ("ratio", "ratio", 1, "{:.2f}")
MOE_LAYER = [("ms", "wall_s", 1e3, "{:.1f}"), RATIO, ("peak MiB", "peak_bytes", 2**-20, "{:.0f}")]
GENERATION = [
    ("tokens/s", "tokens_per_s", 1, "{:.1f}"),
    RATIO,
    ("first token, s", "first_token_s", 1, "{:.3f}"),
    ("decode step, ms", "step_s", 1e3, "{:.2f}"),
]
IMAGES = [
    ("CPU ms per image", "cpu_s_per_unit", 1e3, "{:.2f}"),
    ("ratio of CPU seconds", "ratio_cpu", 1, "{:.2f}"),
    ("over LLaVA's own code", "ratio_cpu_to_original", 1, "{:.2f}"),
    ("mean distance from LLaVA's, normalised pixels", "distance", 1, "{:.1e}"),
]
ANNOTATIONS = [
    ("open warm, s", "open_s", 1, "{:.2f}"),
    ("first time, s", "first_open_s", 1, "{:.1f}"),
    ("us per record", "record_us", 1, "{:.1f}"),
    ("private MB, increase", "private_bytes", 1e-6, "{:.0f}"),
    ("private MB, all", "private_bytes_of_process", 1e-6, "{:.0f}"),
]
CHECK = [
    ("files/s", "rate", 1, "{:,.0f}"),
    ("CPU us per file", "cpu_s_per_unit", 1e6, "{:.1f}"),
    ("ratio", "ratio", 1, "{:.2f}"),
]
START_UP = [("CPU s", "cpu_s", 1, "{:.2f}"), ("of torch and Trainer", "of_trainer", 1, "{:.2f}")]


def over_itself(figures: dict, clock: str = "") -> str:
    """Return the ratio of the rival that ran twice over itself, with its range; clock: "" for wall, or _cpu."""
    for name, one in figures.items():
        if "self_range" + clock in one:
            low, high = one["self_range" + clock]
            return f" {name} over itself: {one['self_ratio' + clock]:.2f}, {low:.2f}-{high:.2f}."
    return ""


def rivals_table(figures: dict, columns: list) -> str:
    """Return a table with a line for each rival."""
    lines = [["", *(column[0] for column in columns)]]
    for name, one in figures.items():
        cells = [form.format(one[key] * factor) if key in one else "-" for _, key, factor, form in columns]
        lines.append([name, *cells])
    return as_markdown(lines)


def detail_parts(reports: dict) -> list[str]:
    """Return the headings and tables of MoE layer, generation, images, annotations, check and start-up."""
    parts = []
    layers = dig(reports, "moe_layer", "results", "training") or {}
    parts += ["## MoE layer, forward and backward"] if layers else []
    for num_tokens, figures in layers.items():
        base = next(iter(figures.values())).get("base", "the first")
        parts += [f"{num_tokens} tokens; ratio over {base}.{over_itself(figures)}", rivals_table(figures, MOE_LAYER)]
    parts += grouped("Generation", dig(reports, "generation", "results"), GENERATION)
    parts += grouped("Images", dig(reports, "images", "results"), IMAGES, "_cpu")
    tables = [("Annotations", "annotations", ANNOTATIONS), ("Check of images seen before", "check", CHECK)]
    for title, name, columns in (*tables, ("Start-up", "start_up", START_UP)):
        figures = dig(reports, name, "results")
        parts += [f"## {title}", over_itself(figures).strip(), rivals_table(figures, columns)] if figures else []
    return parts


def grouped(title: str, groups: dict | None, columns: list, clock: str = "") -> list[str]:
    """Return a heading, and a table for each group of rivals."""
    parts = [f"## {title}"] if groups else []
    for name, figures in (groups or {}).items():
        parts += [f"{name[0].upper()}{name[1:]}.{over_itself(figures, clock)}", rivals_table(figures, columns)]
    return parts
