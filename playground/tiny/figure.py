"""Turn a report into one PNG: sample images with question and answer, the losses, the load of the experts."""

from PIL import Image

from llava_lite.train.monitor.log_lines import read_metrics
from llava_lite.train.monitor.plots import get_window, series, smooth

SAMPLES = {"digit": 3, "colour": 2, "count": 2, "where": 2, "colour_of": 1, "caption": 2}
COLUMNS = 6


def samples(asked):
    """Return SAMPLES[kind] records of each kind, evenly from those that were asked."""
    chosen = []
    for kind, num in SAMPLES.items():
        records = [record for record in asked if record["kind"] == kind]
        chosen += [records[i * len(records) // num] for i in range(min(num, len(records)))]
    return chosen


def wrap(text, width=26):
    """Return `text` broken at spaces."""
    lines = [""]
    for word in text.split():
        lines[-1:] = [f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < width else [lines[-1], word]
    return "\n".join(lines)


def draw_samples(axes, asked):
    """Draw images, each with its question above and the model's answer below: green if right, red if wrong."""
    for axis in axes[len(asked) :]:
        axis.set_axis_off()
    for axis, record in zip(axes, asked, strict=False):
        with Image.open(record["image"]) as image:
            axis.imshow(image.convert("RGB"), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(wrap(record["question"]), fontsize=10)
        is_right = record["with_image"] == record["answer"]
        label = record["with_image"] if is_right else f"{record['with_image']} (right: {record['answer']})"
        axis.set_xlabel(wrap(label), fontsize=10, color="green" if is_right else "red")


def draw_losses(axis, out, stages):
    """Draw the loss of each stage over its steps, one after the other."""
    first = 0
    for stage in stages:
        lines = [line for line in read_metrics(out / stage["stage"] / "metrics.jsonl") if "loss" in line]
        steps, losses = series(lines, "lm_loss" if "lm_loss" in lines[-1] else "loss")
        axis.plot([first + step for step in steps], losses, color="0.85")
        axis.plot(
            [first + step for step in steps],
            smooth(losses, get_window(len(losses))),
            label=f"{stage['stage']}, {stage['accuracy']:.0%} right",
        )
        first += steps[-1]
    axis.set(xlabel="step", ylabel="cross-entropy a token", yscale="log", title="loss")
    axis.legend(fontsize=8)


def draw_load(axis, load):
    """Draw the fraction of the assignments that each expert got, a bar for each MoE layer."""
    layers = list(load)
    bottom = [0.0] * len(layers)
    for expert in range(len(load[layers[0]])):
        fractions = [load[layer][expert] for layer in layers]
        axis.bar([f"layer {layer}" for layer in layers], fractions, bottom=bottom, label=f"expert {expert}")
        bottom = [low + fraction for low, fraction in zip(bottom, fractions, strict=True)]
    axis.set(title="expert load", ylabel="fraction of assignments", ylim=(0, 1))
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def draw_report(out, report, asked):
    """Write report.png below `out`; asked: the records that the last stage answered."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 11), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(2, 1))
    draw_samples(above.subplots(2, COLUMNS).flatten(), samples(asked))
    experts = report.get("experts")
    losses, *others = below.subplots(1, 2 if experts else 1, squeeze=False)[0]
    draw_losses(losses, out, report["stages"])
    if experts:
        draw_load(others[0], experts["load"])
    figure.savefig(out / "report.png", dpi=100)
