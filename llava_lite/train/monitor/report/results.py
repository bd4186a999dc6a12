"""The sections of the page on what came out of a run: curves, expert load, samples, scores, cost."""

from llava_lite.train.monitor.log_lines import GENERATIONS, METRICS
from llava_lite.train.monitor.plots import get_layers, has_matplotlib
from llava_lite.train.monitor.report import charts
from llava_lite.train.monitor.report.cost import Cost
from llava_lite.train.monitor.report.files import RUN, STATE
from llava_lite.train.monitor.report.html import Html, details, facts, fault, faults, image, section, table, tag
from llava_lite.train.monitor.report.samples import DIRECTORY
from llava_lite.train.monitor.report.sections import get_experts
from llava_lite.train.monitor.report.words import clock, count, logged, number

MOST_SAMPLES, MOST_ANSWERS, MOST_ROWS, MOST_EVALUATIONS = 24, 6, 12, 100
# What is shown of a long prompt at once, in characters: its end, where the question is.
PROMPT_END = 240


def log_notes(run) -> list[Html]:
    """Return what is wrong with metrics.jsonl, and where the numbers are from then."""
    notes = faults(run, METRICS)
    if notes and run.lines and run.is_log_of_state:
        notes.append(tag("p", f"These are the numbers that {STATE} kept.", class_="note"))
    return notes


def curves(run) -> Html:
    """Return the curves of the log, and their figures as a table."""
    notes = log_notes(run)
    if not any(run.series(key)[1] for key in ("loss", "eval_loss")):
        words = "No step has been logged." if not run.lines else "No loss is logged that is a number."
        return section("Curves", *(notes or [tag("p", words, class_="note")]), figures(run))
    if not has_matplotlib():
        words = "The curves are drawn where matplotlib is installed: pip install 'llava-lite[train]'."
        return section("Curves", *notes, tag("p", words, class_="note"), figures(run))
    wanted = [
        (run.loss_key, "Loss", "cross-entropy of a supervised token, in nats", "loss", "eval_loss"),
        ("moe_loss", "Balance loss", "of all layers, weighted as it is trained on", "balance", "eval_moe_loss"),
        ("learning_rate", "Learning rate", "of the first group of parameters", "rate"),
        ("grad_norm", "Gradient norm", "before clipping", "norm"),
        ("tokens_per_s", "Speed", "tokens/s a device, padding not counted", "speed"),
    ]
    drawn = [one for args in wanted if (one := charts.curve(run, *args)) is not None]
    return section("Curves", *notes, tag("div", *drawn, class_="charts"), figures(run))


def figures(run) -> Html | None:
    """Return evenly spaced lines of the log, the first and the last included, and the evaluations."""
    names = {run.loss_key: "loss", "eval_loss": "evaluation", "learning_rate": "learning rate"}
    names |= {"grad_norm": "gradient norm", "tokens_per_s": "tokens/s", "mfu": "MFU"}
    names = {key: name for key, name in names.items() if run.series(key)[1]}
    lines = [line for line in run.lines if run.loss_key in line]
    evaluations = [line for line in run.lines if "eval_loss" in line]
    kept = charts.even(lines, MOST_ROWS), charts.even(evaluations, MOST_EVALUATIONS)
    caption = f"{some_of(kept[0], lines, 'log')}; {some_of(kept[1], evaluations, 'evaluation')}."
    rows = [
        (number(line["step"]), *(logged(line.get(key), key) for key in names))
        for line in sorted([*kept[0], *kept[1]], key=lambda line: line["step"])
    ]
    shown = table(("step", *names.values()), rows, range(len(names) + 1), caption)
    return details("The curves as numbers", shown) if rows else None


def some_of(kept, all_of_them, noun: str) -> str:
    """Return how many lines of a kind a table has: all 5 logs, or 12 of 250 logs, evenly spaced."""
    if len(kept) == len(all_of_them):
        return f"All {count(len(kept), noun)}" if len(kept) > 1 else count(len(kept), noun)
    return f"{len(kept)} of {count(len(all_of_them), noun)}, evenly spaced"


def experts(run) -> Html | None:
    """Return the load of the experts over the steps and at the last log; None for a dense model."""
    notes = log_notes(run)
    if not run.expert_lines:
        known = get_experts(run.record, run.config)
        if not known and not (notes and not run.record):
            return None
        none = tag("p", "No load of an expert has been logged.", class_="note")
        return section("Expert load", *(faults(run, METRICS) or [none]))
    step, last = run.expert_lines[-1]
    rows = []
    for layer in get_layers([(step, last)]):
        load = charts.get_loads([(step, last)], layer)[1]
        if load:
            spread = f"{min(load[0]):.1%} to {max(load[0]):.1%}"
            rest = [logged(last[layer].get(key), key) for key in ("dead", "dropped", "balance_loss")]
            rows.append((layer, len(load[0]), spread, *rest))
    header = ("layer", "experts", "load", "without a token", "dropped", "balance loss")
    caption = f"At the last log, step {step:,}. The balance loss of an even load is 1."
    words = "The fraction of a layer's assignments that each expert gets; a token has one to each of its experts."
    drawn = charts.expert_charts(run) if has_matplotlib() else None
    return section(
        "Expert load", *notes, tag("p", words, class_="note"), drawn, table(header, rows, range(6), caption)
    )


def sample_notes(run) -> list[Html]:
    """Return what is wrong with the answers and with the images that belong to them."""
    was_evaluated = bool(run.series("eval_loss")[1]) and bool(run.record.get("images"))
    notes = faults(run, GENERATIONS) if was_evaluated or GENERATIONS not in run.files.missing else []
    if run.samples and not run.record.get("images") and (run.directory / DIRECTORY).is_dir():
        reason = run.files.sentence(RUN) or "run.json names none."
        notes.append(fault(f"Which images of {DIRECTORY}/ belong to the answers is not known: {reason}"))
    return notes


def samples(run) -> Html:
    """Return the records that the evaluations answered, with their images and answers."""
    notes = sample_notes(run)
    if not run.samples:
        words = "None: answers are written at each evaluation (--eval_strategy, and --eval_split or --eval_data_path)."
        return section("Samples", *(notes or [tag("p", words, class_="note")]))
    more = f"The first {MOST_SAMPLES} of {len(run.samples):,}. " if len(run.samples) > MOST_SAMPLES else ""
    words = f"{more}Records of the evaluation data, answered greedily at the evaluations."
    shown = map(sample, run.samples[:MOST_SAMPLES])
    return section("Samples", *notes, tag("p", words, class_="note"), tag("div", *shown, class_="samples"))


def sample(one) -> Html:
    """Return a record with its images, its prompt, the answer that is expected, and those at some steps."""
    prompt, answers = one["prompt"], one["answers"]
    cut = len(prompt) > PROMPT_END + 60
    kept = charts.even(answers, MOST_ANSWERS)
    rows = [tag("div", tag("dt", "expected"), tag("dd", one["expected"]))]
    for step, answer in kept:
        same = tag("span", ", as expected", class_="same") if answer.strip() == one["expected"].strip() else None
        rows.append(tag("div", tag("dt", f"at step {number(step)}", same), tag("dd", answer or tag("em", "empty"))))
    some = f"{len(kept)} of the answers of {len(answers):,} evaluations." if len(kept) < len(answers) else None
    return tag(
        "article",
        tag("h3", one["id"]),
        *(image(url, f"image {i + 1} of record {one['id']}") for i, url in enumerate(one["images"])),
        *map(fault, one["lost"]),
        tag("p", f"... {prompt[-PROMPT_END:].lstrip()}" if cut else prompt, class_="text"),
        details("the complete prompt", tag("p", prompt, class_="text")) if cut else None,
        tag("dl", *rows),
        tag("p", some, class_="note") if some else None,
        class_="sample",
    )


def scores(run) -> Html:
    """Return the scores that `llava-lite eval` gave the model."""
    notes = [fault(sentence) for sentence in run.scores_faults]
    if not run.scores:
        words = (
            "None found. Once `llava-lite eval` has written results.json below the run, or in eval/ beside it, "
            "`llava-lite report` shows them; --scores DIR names another place."
        )
        return section("Scores", *(notes or [tag("p", words, class_="note")]))
    header = ("benchmark", "score is", "score", "95% interval", "questions", "date")
    rows = map(score_row, run.scores)
    return section("Scores", *notes, table(header, rows, numbers=(2, 3, 4)), *map(score_details, run.scores))


def score_row(score) -> tuple:
    """Return the row of a benchmark."""
    report, interval = score.report, score.report.get("interval_95")
    is_interval = isinstance(interval, list) and len(interval) == 2
    spread = f"{number(interval[0])} to {number(interval[1])}" if is_interval else ""
    asked = number(report.get("num_questions", ""))
    return score.title, report["metric"], number(report["score"]), spread, asked, clock(report.get("date"))


def score_details(score) -> Html:
    """Return the parts of a score, what others report, and where it is from."""
    report = score.report
    parts = [(name, number(value)) for name, value in (report.get("scores") or {}).items()]
    others = [(one["model"], number(one["score"]), one["source"]) for one in report.get("published") or ()]
    return details(
        score.title,
        table(("part", "score"), parts, numbers=(1,)),
        table(("reported by others", "score", "source"), others, numbers=(1,)),
        *(tag("p", note, class_="note") for note in report.get("notes") or ()),
        tag("p", f"{score.path}, of the model {score.model}", class_="note"),
    )


def cost(run) -> Html:
    """Return what the run took."""
    pairs = Cost(run).rows()
    notes = log_notes(run)
    nothing = None if pairs or notes else tag("p", "Nothing is logged.", class_="note")
    return section("Cost", *notes, facts(pairs) if pairs else nothing)
