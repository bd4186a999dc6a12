"""Turn the files of a run into what a person should read first: spikes, skipped records, dead experts."""

import math
from collections import Counter

import numpy as np

from llava_lite.train.monitor.log_lines import GENERATIONS, METRICS, is_number
from llava_lite.train.monitor.losses import get_ends
from llava_lite.train.monitor.plots import get_layers, get_loads
from llava_lite.train.monitor.report.words import count, number

# A loss is a spike that is SPIKE times the median of the AROUND logs on either side of it, and stands out among the
# others: on a logarithmic scale TWICE as far above it as the loss that 98% of the logs stay below.
SPIKE, TWICE, USUAL, AROUND = 1.3, 2, 98, 10
# The gradient norm of a step, in medians of the logs around it.
GRADIENT_SPIKE = 10
# The fraction of the logged intervals that may be slow.
SLOW = 0.05
MOST_NAMED = 5
# Keys of the log that are drawn.
CURVES = {
    "loss": "loss",
    "lm_loss": "cross-entropy",
    "grad_norm": "gradient norm",
    "eval_loss": "evaluation loss",
    "moe_loss": "balance loss",
    "learning_rate": "learning rate",
    "tokens_per_s": "speed",
}


def find(run) -> list[str]:
    """Return what is worth knowing about a run, the gravest first; [] where there is nothing."""
    finders = (
        ends,
        files,
        not_finite,
        steps_left_out,
        spikes,
        gradients,
        learns_nothing,
        evaluations,
        skipped,
        experts,
        starts,
        records,
        pace,
    )
    return [sentence for finder in finders for sentence in finder(run)]


def ends(run):
    """Yield how a run ended, if not by its last step."""
    end = run.record.get("end", {})
    if run.status == "failed":
        yield f"The run ended with an error after step {run.step:,}: {end.get('reason', 'no reason is recorded')}"
    elif run.status == "stopped":
        yield f"The run was stopped after step {run.step:,}; the same command resumes it from {last_checkpoint(run)}."
    elif run.status == "open":
        yield (
            f"No end of the run is recorded: it is in progress, or was killed. Its last files are of "
            f"{run.last_written:%Y-%m-%d %H:%M}, at step {run.step:,}; it would resume from {last_checkpoint(run)}."
        )


def last_checkpoint(run) -> str:
    """Return the name of the newest checkpoint, or that there is none."""
    return run.checkpoints[0].name if run.checkpoints else "its start, since it has no checkpoint"


def files(run):
    """Yield what is missing or damaged of the files of a run."""
    yield from run.files.damaged
    if METRICS in run.files.missing and (run.record.get("starts") or run.step):
        yield f"{METRICS} is missing, which every run writes."
    if GENERATIONS in run.files.missing and run.record.get("images") and run.series("eval_loss")[1]:
        yield f"{GENERATIONS} is missing, although the run was evaluated and kept images of its records."
    lost = [sentence for sample in run.samples for sentence in sample["lost"]]
    if lost:
        yield f"{count(len(lost), 'image')} of the samples cannot be shown; the first: {lost[0]}"
    yield from run.scores_faults


def not_finite(run):
    """Yield the steps at which a curve has NaN, an infinity, a text, or a number too large to be drawn."""
    for key, what in CURVES.items():
        found = [(line["step"], line[key]) for line in run.lines if line.get(key) is not None]
        wrong = [(step, value) for step, value in found if not is_number(value)]
        if wrong:
            kinds = {str(value).lower() for _, value in wrong}
            words = "not finite" if kinds <= {"nan", "inf", "-inf"} else f"no usable number ({str(wrong[0][1])[:20]})"
            yield f"The {what} is {words} at {named_steps([step for step, _ in wrong])}."


def steps_left_out(run):
    """Yield how many steps were left out, and the logs whose means are without them."""
    steps, counts = run.series("skipped_steps")
    if steps:
        where = named_steps(steps)
        yield (
            f"{count(sum(counts), 'step')} left out, with a loss or a gradient that was not finite "
            f"(--max_skipped_steps): in the logs at {where}."
        )


def named_steps(steps) -> str:
    """Return the first steps of a list, and how many there are in all."""
    shown = ", ".join(f"{step:,}" for step in steps[:MOST_NAMED])
    return f"step{'s' * (len(steps) != 1)} {shown}" + (f" and {len(steps) - MOST_NAMED:,} more" * (len(steps) > 5))


def medians(values) -> np.ndarray:
    """Return the median of the AROUND values on either side of each value, [N]; at an end the outermost repeats."""
    padded = np.pad(np.asarray(values, float), AROUND, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * AROUND + 1), axis=1)


def spikes(run):
    """Yield the steps at which the loss stood far above the logs around it."""
    steps, losses = run.series(run.loss_key)
    if len(losses) < AROUND or min(losses) <= 0:
        return
    usual = medians(losses)
    above = np.log(np.asarray(losses) / usual)
    bound = max(math.log(SPIKE), TWICE * np.percentile(above, USUAL, method="lower"))
    found = [(losses[i], steps[i], usual[i]) for i in np.flatnonzero(above > bound).tolist()]
    # A loss falls steeply at the start; that is no spike.
    found = [one for one in found if one[1] > steps[AROUND // 2]]
    if found:
        worst = max(found, key=lambda one: one[0] / one[2])
        yield (
            f"The loss spikes at {named_steps([step for _, step, _ in found])}; the highest is {worst[0]:.3g} at step "
            f"{worst[1]:,}, where the logs around it have {worst[2]:.3g}."
        )


def gradients(run):
    """Yield the steps whose gradient norm is far above those around it."""
    steps, norms = run.series("grad_norm")
    if len(norms) < AROUND:
        return
    found = [
        step
        for step, norm, usual in zip(steps, norms, medians(norms), strict=True)
        if norm > GRADIENT_SPIKE * usual > 0
    ]
    if found:
        times = f"more than {GRADIENT_SPIKE} times that of the logs around it"
        yield f"The gradient norm is {times} at {named_steps(found)}."


def learns_nothing(run):
    """Yield that the loss of the last logs is not below that of the first."""
    losses = run.series(run.loss_key)[1]
    ends = get_ends(losses)
    if len(losses) >= AROUND and ends.last >= ends.first:
        yield f"The loss did not fall: {ends.first:.4g} in the first tenth of the logs, {ends.last:.4g} in the last."


def evaluations(run):
    """Yield that the evaluation loss was lower before, and answers that are empty."""
    steps, losses = run.series("eval_loss")
    if losses and min(losses) < 0.95 * losses[-1]:
        best = int(np.argmin(losses))
        yield (
            f"The evaluation loss was lowest at step {steps[best]:,} ({losses[best]:.4g}) and is {losses[-1]:.4g} at "
            "the last evaluation: the run overfits, or its learning rate is too high."
        )
    empty = sum(not sample["answers"][-1][1].strip() for sample in run.samples)
    if empty:
        yield f"{empty} of {count(len(run.samples), 'sample')} got an empty answer at the last evaluation."


def skipped(run):
    """Yield how many records were left out, of which kinds, and the first of them."""
    for name, what in (("train", "training"), ("eval", "evaluation")):
        lines = run.skipped[name]
        if lines:
            kinds = Counter(str(line.get("kind", "record")) for line in lines)
            listed = ", ".join(f"{number:,} for its {kind}" for kind, number in kinds.most_common())
            yield (
                f"{count(len(lines), 'record')} of the {what} data left out ({listed}); the first: "
                f"{str(lines[0].get('reason', 'no reason is logged'))[:300]}"
            )


def experts(run):
    """Yield the experts that got no token in the last tenth of the log, and assignments that were dropped."""
    lines = run.expert_lines
    dead = []
    for layer in get_layers(lines):
        loads = get_loads(lines, layer)[1]
        late = np.array(loads[-max(1, len(loads) // 10) :])
        idle = np.flatnonzero(late.sum(axis=0) == 0).tolist() if len(late) else []
        if idle:
            dead.append(f"layer {layer}: {'expert' if len(idle) == 1 else 'experts'} {', '.join(map(str, idle))}")
    if dead:
        more = f" and {len(dead) - MOST_NAMED} more layers" * (len(dead) > MOST_NAMED)
        yield f"Dead experts, without a token in the last tenth of the log: {'; '.join(dead[:MOST_NAMED])}{more}."
    found = [report[layer].get("dropped") for _, report in lines[-1:] for layer in report]
    dropped = [fraction for fraction in found if is_number(fraction)]
    if dropped and max(dropped) > 0.01:
        yield f"At the last log up to {max(dropped):.1%} of a layer's assignments are dropped (--capacity_factor)."


def starts(run):
    """Yield that a run was resumed, and how it had ended before."""
    found = run.record.get("starts", ())
    if len(found) > 1:
        places = ", ".join(number(start.get("step", 0)) for start in found[1:])
        ended = [str(one["reason"]) for start in found[:-1] if (one := start.get("end")) and one.get("reason")]
        ranks = [str(start.get("ranks")) for start in found]
        changed = f" The ranks were {', '.join(ranks)}." if len(set(ranks)) > 1 else ""
        before = f" Before it: {'; '.join(dict.fromkeys(ended))}." if ended else ""
        yield f"The run was resumed, from step {places}.{changed}{before}"


def records(run):
    """Yield that many records are longer than the model reads."""
    data = run.record.get("data", {}).get("train", {})
    if data.get("truncated"):
        part = f"{data['truncated'] / max(1, data['records']):.1%}"
        longer = f"longer than --model_max_length {data['max_length']:,}"
        yield f"{count(data['truncated'], 'record')} ({part}) {longer}, truncated in training."


def pace(run):
    """Yield that many of the logged intervals were much slower than the others; the first one starts everything."""
    rates = run.series("tokens_per_s")[1][1:]
    if len(rates) < AROUND:
        return
    usual = float(np.median(rates))
    slow = sum(rate < usual / 2 for rate in rates)
    if slow > SLOW * len(rates):
        yield (
            f"{slow:,} of {len(rates):,} logged intervals ran at under half the median speed of {usual:,.0f} tokens/s "
            "a device: a slow disk, other programs, or batches of few tokens."
        )
