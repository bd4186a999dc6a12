"""Turn metrics.jsonl into pictures: loss.png, and expert_load.png for a model with experts."""

import logging
from functools import cache
from pathlib import Path

from llava_lite.train.run_log import METRICS, read_metrics

logger = logging.getLogger(__name__)


@cache
def has_matplotlib():
    """Whether matplotlib is installed; says so once if not."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        logger.warning("no plots: matplotlib is not installed (pip install 'llava-lite[train]').")
        return False
    return True


def draw_plots(output_dir):
    """Draw the plots of a run into its folder; return their paths. Nothing to draw gives none."""
    lines = read_metrics(Path(output_dir) / METRICS)
    if not has_matplotlib():
        return []
    paths = []
    if any("loss" in line for line in lines):
        paths.append(draw_loss(lines, Path(output_dir) / "loss.png"))
    if any("experts" in line for line in lines):
        paths.append(draw_expert_load(lines, Path(output_dir) / "expert_load.png"))
    return paths


def new_figure(rows, columns, width, height):
    """Return (figure, axes) drawn without a display; axes is a list."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]


def series(lines, key):
    """Return steps and values of a key, where a line has it as a number."""
    pairs = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]
    return [step for step, _ in pairs], [value for _, value in pairs]


def smooth(values, weight=0.9):
    """Return the running mean of a curve, each value with `weight` on what came before (bias corrected)."""
    means, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
        means.append(total / mass)
    return means


def draw_loss(lines, path):
    """Draw cross-entropy, its running mean, the evaluation loss and, apart, the balance loss."""
    has_balance = any("moe_loss" in line for line in lines)
    figure, axes = new_figure(1, 2 if has_balance else 1, 12 if has_balance else 7, 4)
    steps, losses = series(lines, "lm_loss" if has_balance else "loss")
    axes[0].plot(steps, losses, color="0.75", label="each log")
    axes[0].plot(steps, smooth(losses), label="running mean")
    eval_steps, eval_losses = series(lines, "eval_loss")
    if eval_steps:
        axes[0].plot(eval_steps, eval_losses, "o-", label="evaluation")
    axes[0].set(xlabel="step", ylabel="cross-entropy a token")
    axes[0].legend()
    if has_balance:
        axes[1].plot(*series(lines, "moe_loss"))
        axes[1].set(xlabel="step", ylabel="balance loss, weighted, all layers")
    figure.savefig(path, dpi=120)
    return path


def draw_expert_load(lines, path):
    """Draw for each MoE layer the share of the choices that each expert got, over the steps."""
    reports = [(line["step"], line["experts"]) for line in lines if "experts" in line]
    layers = list(reports[-1][1])
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure, axes = new_figure(rows, columns, 3.2 * columns, 2.6 * rows)
    for axis, layer in zip(axes, layers, strict=False):
        loads = [(step, report[layer]["load"]) for step, report in reports if layer in report]
        curves = zip(*(smooth(curve) for curve in zip(*(load for _, load in loads), strict=True)), strict=True)
        shares = list(zip(*curves, strict=True))
        axis.stackplot([step for step, _ in loads], shares, labels=[f"expert {i}" for i in range(len(shares))])
        axis.set(title=f"layer {layer}", ylim=(0, 1), xlabel="step", ylabel="share of choices")
    for axis in axes[len(layers) :]:
        axis.set_visible(False)
    # Once for all layers, from the one with the most experts; the topmost first, as they lie.
    handles, labels = max(
        (axis.get_legend_handles_labels() for axis in axes[: len(layers)]), key=lambda pair: len(pair[0])
    )
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper")
    figure.savefig(path, dpi=120)
    return path
