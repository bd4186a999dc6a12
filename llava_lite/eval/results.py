"""Write the result of a benchmark: results.json, a table, and a bar chart beside what papers report."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from llava_lite import __version__
from llava_lite.eval.benchmarks.base import Benchmark, Scores
from llava_lite.eval.published import Published, published, why_not_beside
from llava_lite.output_file import ESCAPED

LIBRARIES = ("torch", "transformers", "tokenizers", "accelerate", "peft", "pillow", "datasets")
# The blue of what is measured, and the grey of what others report.
OURS_COLOUR, THEIRS_COLOUR = "#2a6fdb", "#b8bec8"


def versions() -> dict[str, str]:
    """Return the versions of this package and of the libraries that an answer depends on, where they are installed."""
    found = {"llava-lite": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def to_report(benchmark: Benchmark, scores: Scores, run: Mapping[str, Any], num_questions: int) -> dict[str, Any]:
    """Return the content of results.json."""
    reason = why_not_beside(benchmark.name, num_questions)
    parts = [benchmark.title, run.get("split"), run.get("variant")]
    return {
        "benchmark": benchmark.name,
        "title": " ".join(part for part in parts if part),
        "metric": scores.metric,
        "score": scores.main,
        "interval_95": scores.interval,
        "num_questions": num_questions,
        "scores": dict(scores.table),
        "notes": [*scores.notes, *filter(None, [reason])],
        "run": dict(run),
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "published": [one._asdict() for one in published(benchmark.name) if reason is None],
    }


def to_text(report: Mapping[str, Any]) -> str:
    """Return a report as a table in Markdown, with the figures of papers below."""
    lines = [
        f"# {report['title']}",
        "",
        f"{report['run']['model']}, {report['num_questions']:,} questions",
        "",
    ]
    lines += ["| | |", "| --- | --- |", f"| **{report['metric']}** | **{show(report['score'])}** |"]
    if report["interval_95"] is not None:
        low, high = report["interval_95"]
        lines.append(f"| 95% interval | {show(low)} to {show(high)} |")
    lines += [f"| {name} | {show(value)} |" for name, value in report["scores"].items()]
    if report["published"]:
        lines += ["", "Reported by others:", "", "| model | score | source |", "| --- | --- | --- |"]
        lines += [f"| {one['model']} | {show(one['score'])} | {one['source']} |" for one in report["published"]]
    lines += [line for note in report["notes"] for line in ("", note)]
    return "\n".join(lines) + "\n"


def show(value) -> str:
    """Return a figure for a table; "not scored here" for None."""
    if value is None:
        return "not scored here"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def write_report(out: Path, report: Mapping[str, Any]) -> list[Path]:
    """Write results.json, results.md and, where there is a score and matplotlib, results.png; return the files."""
    files = [out / "results.json", out / "results.md"]
    files[0].write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", errors=ESCAPED)
    files[1].write_text(to_text(report), encoding="utf-8", errors=ESCAPED)
    if report["score"] is not None and draw(out / "results.png", report):
        files.append(out / "results.png")
    return files


def draw(path: Path, report: Mapping[str, Any]) -> bool:
    """Draw the score beside those that others report; return False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    name = Path(str(report["run"]["model"])).name
    bars = [Published(name, report["score"], ""), *(Published(**one) for one in report["published"])]
    figure = Figure(figsize=(7, 1.1 + 0.34 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    colours = [OURS_COLOUR, *[THEIRS_COLOUR] * (len(bars) - 1)]
    axes.barh(range(len(bars)), [bar.score for bar in bars], color=colours)
    axes.set_yticks(range(len(bars)), [bar.model for bar in bars])
    ends = [bar.score for bar in bars]
    if report["interval_95"] is not None:
        score, (low, high) = report["score"], report["interval_95"]
        # The percentiles of few questions may lie on one side of the score.
        lengths = [[max(0, score - low)], [max(0, high - score)]]
        axes.errorbar(score, 0, xerr=lengths, color="black", capsize=3)
        ends[0] = max(score, high)
    for row, (bar, end) in enumerate(zip(bars, ends, strict=True)):
        axes.annotate(show(float(bar.score)), (end, row), (6, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    sources = "; ".join(dict.fromkeys(bar.source for bar in bars[1:]))
    axes.set_xlabel(report["metric"] + (f"\ngrey: {sources}" if sources else ""))
    axes.set_title(f"{report['title']}, {report['num_questions']:,} questions", loc="left")
    FigureCanvasAgg(figure).print_png(path)
    return True
