"""Turn the directory of a run into one self-contained HTML page: no script, and nothing is fetched."""

from datetime import datetime
from pathlib import Path

from llava_lite import __version__
from llava_lite.output_file import write_output
from llava_lite.train.monitor.losses import get_ends, loss_text
from llava_lite.train.monitor.report import results, sections
from llava_lite.train.monitor.report.cost import Cost
from llava_lite.train.monitor.report.files import REPORT
from llava_lite.train.monitor.report.findings import find
from llava_lite.train.monitor.report.html import Html, document, fault, join, section, tag
from llava_lite.train.monitor.report.read import Run, read_run
from llava_lite.train.monitor.report.style import CSS
from llava_lite.train.monitor.report.words import big, clock, count, number, span, time_line
from llava_lite.train.publish.card import STAGES

STATES = {"open": "no end recorded"}
MOST_SCORES = 3
SECTIONS = {
    "The run": sections.what_it_is,
    "Data": sections.data,
    "What trained": sections.trained,
    "Curves": results.curves,
    "Expert load": results.experts,
    "Samples": results.samples,
    "Scores": results.scores,
    "Cost": results.cost,
    "Flags": sections.flags,
}


def write_report(run_dir, out=None, score_dirs=()) -> Path:
    """Write the page of a run and return its path; `out` is run_dir/report.html unless it is given.

    score_dirs: see read_run, which also says what is raised; write_output says it of `out`. A part whose file is
    damaged says so in its place.
    """
    run = read_run(run_dir, score_dirs)
    path = Path(run_dir) / REPORT if out is None else Path(out)
    write_output(path, to_page(run), REPORT)
    return path


def to_page(run: Run) -> str:
    """Return the page."""
    name = run.directory.resolve().name
    broken: list[str] = []
    parts = [draw(run, broken, title, part) for title, part in SECTIONS.items()]
    first = [
        draw(run, broken, "Head", lambda run: head(run, name), tag("h1", name)),
        draw(run, broken, "Worth knowing", lambda run: worth_knowing(run, broken)),
    ]
    made = f"Made by llava-lite {__version__} on {datetime.now():%Y-%m-%d %H:%M} from {run.directory}."
    return document(f"{name}: report of a training run", tag("main", *first, *parts, tag("footer", made)), CSS)


def draw(run, broken: list[str], title: str, part, instead: Html | None = None) -> Html | None:
    """Return a part of the page; where a file is not as it is written here, a sentence, which `broken` gets too."""
    try:
        return part(run)
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        broken.append(f"{title}: not shown, since a file of the run is not as llava-lite writes it ({reason}).")
        return instead or section(title, fault(broken[-1]))


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
    spent, ends, evaluated = Cost(run), get_ends(run.series(run.loss_key)[1]), run.series("eval_loss")[1]
    left = run.max_steps is not None and run.step < run.max_steps
    figures = [("steps", f"{run.step:,}", f"of {run.max_steps:,}" if left else "")]
    if ends:
        name = "loss at the end" if run.status == "finished" else "loss so far"
        figures.append((name, loss_text(ends.last), loss_words(ends)))
    if evaluated:
        lowest = min(evaluated)
        better = f"lowest {loss_text(lowest)}" * (lowest < evaluated[-1])
        figures.append(("evaluation loss", loss_text(evaluated[-1]), better))
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


def loss_words(ends) -> str:
    """Return what the figure of the loss is, and the loss at the start."""
    if ends.num == 1:
        return f"the last log; {loss_text(ends.first)} at the first"
    return f"mean of the last {count(ends.num, 'log')}; {loss_text(ends.first)} of the first {ends.num:,}"


def figure(name: str, value: str, more: str) -> Html:
    """Return a figure with its name, and a line below it."""
    return tag("div", tag("dt", name), tag("dd", value, tag("small", more) if more else None))


def dates(run) -> str:
    """Return when a run began and ended; of an old one when it last wrote."""
    starts, end = run.record.get("starts"), run.record.get("end")
    if not starts:
        return f"last written {run.last_written:%Y-%m-%d %H:%M}"
    first = starts[0].get("date")
    return span(first, end.get("date")) if end else f"since {clock(first)}"


def worth_knowing(run, broken) -> Html:
    """Return what a person should read first. broken: sentences on parts that cannot be shown."""
    found = [*find(run), *broken]
    if found:
        return section("Worth knowing", tag("ul", *(tag("li", sentence) for sentence in found), class_="findings"))
    looked = (
        "errors, missing and damaged files, spikes, values that are not finite, skipped records, dead experts, resumes"
    )
    return section("Worth knowing", tag("p", f"Nothing unusual was found. Looked for: {looked}."))
