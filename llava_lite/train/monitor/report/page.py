"""Turn the directory of a run into one self-contained HTML page: no script, and nothing is fetched."""

import os
from datetime import datetime
from pathlib import Path

from llava_lite import __version__
from llava_lite.train.monitor.report import results, sections
from llava_lite.train.monitor.report.cost import Cost
from llava_lite.train.monitor.report.findings import find
from llava_lite.train.monitor.report.html import Html, document, join, section, tag
from llava_lite.train.monitor.report.read import Run, read_run
from llava_lite.train.monitor.report.style import CSS
from llava_lite.train.monitor.report.words import big, clock, number, span
from llava_lite.train.monitor.summary import REPORT, time_line
from llava_lite.train.publish.card import STAGES

STATES = {"open": "no end recorded"}
MOST_SCORES = 3


def write_report(run_dir, out=None, score_dirs=()) -> Path:
    """Write the page of a run and return its path; `out` is run_dir/report.html unless it is given.

    score_dirs: see read_run, which also says what is raised. ValueError for a file of the run whose content is not as
    it is written here, IsADirectoryError for an `out` that is a directory.
    """
    run = read_run(run_dir, score_dirs)
    path = Path(run_dir) / REPORT if out is None else Path(out)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a directory; the page is a file, such as {str(path / REPORT)!r}.")
    try:
        page = to_page(run)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"a file of {str(run_dir)!r} is not as llava-lite writes it ({reason}).") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part")
    # A lone surrogate of an answer has no bytes.
    try:
        draft.write_text(page, encoding="utf-8", errors="replace")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def to_page(run: Run) -> str:
    """Return the page."""
    name = run.directory.resolve().name
    parts = [head(run, name), worth_knowing(run)]
    parts += [part(run) for part in (sections.what_it_is, sections.data, sections.trained)]
    parts += [part(run) for part in (results.curves, results.experts, results.samples, results.scores, results.cost)]
    made = f"Made by llava-lite {__version__} on {datetime.now():%Y-%m-%d %H:%M} from {run.directory}."
    return document(
        f"{name}: report of a training run", tag("main", *parts, sections.flags(run), tag("footer", made)), CSS
    )


def head(run, name: str) -> Html:
    """Return the name of the run, its state and its main figures."""
    tuning, state = run.tuning, run.status
    return tag(
        "header",
        tag("h1", name, tag("span", STATES.get(state, state), class_=f"badge {state}")),
        tag("p", join(*filter(None, [STAGES.get(tuning, tuning), dates(run)]), by=" · "), class_="sub"),
        tag("dl", *(figure(*one) for one in main_figures(run)), class_="figures"),
    )


def main_figures(run) -> list[tuple[str, str, str]]:
    """Return (name, value, a line below it) of the figures on top; those that are not logged are left out."""
    spent, losses, evaluated = Cost(run), run.series(run.loss_key)[1], run.series("eval_loss")[1]
    left = run.max_steps is not None and run.step < run.max_steps
    figures = [("steps", f"{run.step:,}", f"of {run.max_steps:,}" if left else "")]
    if losses:
        figures.append(("loss at the end", f"{spent.last_loss:.4g}", f"{losses[0]:.4g} at the first log"))
    if evaluated:
        lowest = min(evaluated)
        figures.append(("evaluation loss", f"{evaluated[-1]:.4g}", f"lowest {lowest:.4g}" * (lowest < evaluated[-1])))
    if spent.seconds:
        figures.append(("time", time_line(spent.seconds), "" if spent.is_complete else "of the steps so far"))
    if spent.tokens:
        figures.append(("tokens", big(spent.tokens), "images included"))
    if spent.rate:
        figures.append(("speed", f"{spent.rate:,.0f}", "tokens/s a device"))
    newest = {score.title: score for score in run.scores}
    figures += [(title, number(one.report["score"]), one.report["metric"]) for title, one in newest.items()][
        :MOST_SCORES
    ]
    return figures


def figure(name: str, value: str, more: str) -> Html:
    """Return a figure with its name, and a line below it."""
    return tag("div", tag("dt", name), tag("dd", value, tag("small", more) if more else None))


def dates(run) -> str:
    """Return when a run began and ended; of an old one when it last wrote."""
    starts, end = run.record.get("starts"), run.record.get("end")
    if not starts:
        return f"last written {run.last_written:%Y-%m-%d %H:%M}"
    return span(starts[0]["date"], end["date"]) if end else f"since {clock(starts[0]['date'])}"


def worth_knowing(run) -> Html:
    """Return what a person should read first."""
    found = find(run)
    if not found:
        looked = "errors, spikes, values that are not finite, skipped records, dead experts, resumes"
        return section("Worth knowing", tag("p", f"Nothing unusual was found. Looked for: {looked}."))
    return section("Worth knowing", tag("ul", *(tag("li", sentence) for sentence in found), class_="findings"))
