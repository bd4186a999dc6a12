"""The sections of the page on what came out of a run: curves, expert load, samples, scores, cost."""

from llava_lite.train.monitor.plots import has_matplotlib
from llava_lite.train.monitor.report import charts
from llava_lite.train.monitor.report.cost import Cost
from llava_lite.train.monitor.report.html import Html, details, facts, image, section, table, tag
from llava_lite.train.monitor.report.words import clock, logged, number

MOST_SAMPLES, MOST_ANSWERS, MOST_ROWS, MOST_EVALUATIONS = 24, 6, 12, 100
# What is shown of a long prompt at once, in characters: its end, where the question is.
PROMPT_END = 240


def curves(run) -> Html:
    """Return the curves of the log, and their figures as a table."""
    if not any(run.series(key)[1] for key in ("loss", "eval_loss")):
        return section("Curves", tag("p", "No step has been logged.", class_="note"))
    if not has_matplotlib():
        words = "The curves are drawn where matplotlib is installed: pip install 'llava-lite[train]'."
        return section("Curves", tag("p", words, class_="note"), figures(run))
    wanted = [
        (run.loss_key, "Loss", "cross-entropy of a supervised token, in nats", "loss", "eval_loss"),
        ("moe_loss", "Balance loss", "of all layers, weighted as it is trained on", "balance", "eval_moe_loss"),
        ("learning_rate", "Learning rate", "of the first group of parameters", "rate"),
        ("grad_norm", "Gradient norm", "before clipping", "norm"),
        ("tokens_per_s", "Speed", "tokens/s a device, padding not counted", "speed"),
    ]
    drawn = [one for args in wanted if (one := charts.curve(run, *args)) is not None]
    return section("Curves", tag("div", *drawn, class_="charts"), figures(run))


def figures(run) -> Html:
    """Return evenly spaced lines of the log, the first and the last included, and the evaluations."""
    names = {run.loss_key: "loss", "eval_loss": "evaluation", "learning_rate": "learning rate"}
    names |= {"grad_norm": "gradient norm", "tokens_per_s": "tokens/s", "mfu": "MFU"}
    names = {key: name for key, name in names.items() if run.series(key)[1]}
    lines = [line for line in run.lines if run.loss_key in line]
    kept = charts.even(lines, MOST_ROWS)
    kept += charts.even([line for line in run.lines if "eval_loss" in line], MOST_EVALUATIONS)
    rows = [
        (number(line["step"]), *(logged(line.get(key), key) for key in names))
        for line in sorted(kept, key=lambda line: line["step"])
    ]
    return details("The curves as numbers", table(("step", *names.values()), rows, numbers=range(len(names) + 1)))


def experts(run) -> Html | None:
    """Return the load of the experts over the steps and at the end; None for a dense model."""
    if not run.expert_lines:
        return None
    step, last = run.expert_lines[-1]
    rows = []
    for layer in sorted(last, key=charts.layer_order):
        load = charts.get_loads([(step, last)], layer)[1]
        if load:
            spread = f"{min(load[0]):.1%} to {max(load[0]):.1%}"
            rest = [logged(last[layer].get(key), key) for key in ("dead", "dropped", "balance_loss")]
            rows.append((layer, len(load[0]), spread, *rest))
    header = ("layer", "experts", "load", "without a token", "dropped", "balance loss")
    caption = f"At the last log, step {step:,}. The balance loss of an even load is 1."
    words = "The fraction of a layer's assignments that each expert gets; a token has one to each of its experts."
    drawn = charts.expert_charts(run) if has_matplotlib() else None
    return section("Expert load", tag("p", words, class_="note"), drawn, table(header, rows, range(6), caption))


def samples(run) -> Html:
    """Return the records that the evaluations answered, with their images and answers."""
    if not run.samples:
        words = "None: answers are written at each evaluation (--eval_strategy, and --eval_split or --eval_data_path)."
        return section("Samples", tag("p", words, class_="note"))
    more = f"The first {MOST_SAMPLES} of {len(run.samples):,}. " if len(run.samples) > MOST_SAMPLES else ""
    words = f"{more}Records of the evaluation data, answered greedily at the evaluations."
    shown = map(sample, run.samples[:MOST_SAMPLES])
    return section("Samples", tag("p", words, class_="note"), tag("div", *shown, class_="samples"))


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
        tag("p", f"... {prompt[-PROMPT_END:].lstrip()}" if cut else prompt, class_="text"),
        details("the complete prompt", tag("p", prompt, class_="text")) if cut else None,
        tag("dl", *rows),
        tag("p", some, class_="note") if some else None,
        class_="sample",
    )


def scores(run) -> Html:
    """Return the scores that `llava-lite eval` gave the model."""
    if not run.scores:
        words = (
            "None found. Once `llava-lite eval` has written results.json below the run, or in eval/ beside it, "
            "`llava-lite report` shows them; --scores DIR names another place."
        )
        return section("Scores", tag("p", words, class_="note"))
    header = ("benchmark", "score is", "score", "95% interval", "questions", "date")
    rows = map(score_row, run.scores)
    return section("Scores", table(header, rows, numbers=(2, 3, 4)), *map(score_details, run.scores))


def score_row(score) -> tuple:
    """Return the row of a benchmark."""
    report, interval = score.report, score.report.get("interval_95")
    spread = f"{number(interval[0])} to {number(interval[1])}" if interval else ""
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
    return section("Cost", facts(pairs) if pairs else tag("p", "Nothing is logged.", class_="note"))
