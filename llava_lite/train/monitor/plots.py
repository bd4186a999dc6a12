"""Turn metrics.jsonl into images: loss.png, and expert_load.png for a model with experts."""

import logging
import os
from functools import cache
from pathlib import Path

import numpy as np

from llava_lite.train.monitor.log_lines import LARGEST_STEP, METRICS, is_number, read_metrics, with_steps
from llava_lite.train.monitor.losses import get_loss_key

logger = logging.getLogger(__name__)


@cache
def has_matplotlib():
    """Whether matplotlib is installed; warns once if not."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        logger.warning("no plots: matplotlib is not installed (pip install 'llava-lite[train]').")
        return False
    return True


def draw_plots(output_dir):
    """Draw the plots of a run into its directory; return their paths. Nothing to draw gives none."""
    lines = with_steps(read_metrics(Path(output_dir) / METRICS))
    if not has_matplotlib():
        return []
    paths = []
    if series(lines, get_loss_key(lines))[1]:
        paths.append(draw_loss(lines, Path(output_dir) / "loss.png"))
    if any(get_loads(get_expert_lines(lines), layer)[1] for layer in get_layers(get_expert_lines(lines))):
        paths.append(draw_expert_load(get_expert_lines(lines), Path(output_dir) / "expert_load.png"))
    return paths


def save_figure(figure, path):
    """Write a figure completely or not at all."""
    draft = path.with_name(f"{path.name}.part")
    try:
        figure.savefig(draft, dpi=120, format="png")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def new_figure(rows, columns, width, height):
    """Return (figure, axes) for a file, without a display; axes is a list."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]


def series(lines, key):
    """Return the steps and values of a key, from the lines that have it as a number that can be drawn."""
    pairs = [(line["step"], line[key]) for line in lines if is_number(line.get(key))]
    # Beyond it numpy has no integers.
    values = [value if abs(value) < LARGEST_STEP else float(value) for _, value in pairs]
    return [step for step, _ in pairs], values


def get_expert_lines(lines):
    """Return (step, {layer: its report}) of the lines that have reports of experts."""
    found = [(line["step"], line.get("experts")) for line in lines if isinstance(line.get("experts"), dict)]
    found = [(step, {name: one for name, one in reports.items() if isinstance(one, dict)}) for step, reports in found]
    return [(step, reports) for step, reports in found if reports]


def get_layers(expert_lines):
    """Return the names of all layers that are reported, in the order of their numbers."""
    return sorted({layer for _, reports in expert_lines for layer in reports}, key=layer_order)


def layer_order(layer):
    """Return a key by which layers are in the order of their numbers."""
    return (0, int(layer), "") if layer.isdecimal() else (1, 0, layer)


def get_loads(expert_lines, layer):
    """Return the steps, and the fractions [E] of the assignments at each, of a layer; as many as at its last step."""
    loads = [(step, reports[layer].get("load")) for step, reports in expert_lines if layer in reports]
    loads = [(step, load) for step, load in loads if isinstance(load, list) and load and all(map(is_number, load))]
    loads = [(step, load) for step, load in loads if len(load) == len(loads[-1][1])]
    return [step for step, _ in loads], [load for _, load in loads]


def get_window(num_values):
    """Return how many values a smoothed curve averages, an odd number: one in a short run, 1 in 25 in a long one."""
    return 1 + 2 * round(num_values / 50)


def smooth(values, window):
    """Return the mean of the `window` values around each value.

    Near the start, where a loss falls steeply, the window is smaller and symmetric; at the end it has earlier values
    only. A mean of earlier values everywhere would lag the curve.
    """
    sums, places = np.cumsum([0.0, *values]), np.arange(len(values))
    before = np.minimum(window // 2, places)
    after = np.minimum(before, len(values) - 1 - places)
    return ((sums[places + 1 + after] - sums[places - before]) / (before + 1 + after)).tolist()


def needs_log_axis(values):
    """Tell whether a curve falls to a tenth or less, above zero: on a linear axis its end would be flat."""
    return bool(values) and min(values) > 0 and max(values) >= 10 * min(values)


def use_log_axis(axis):
    """Give a curve a logarithmic axis with plain numbers: 0.3, not 3 x 10^-1."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_yscale("log", nonpositive="mask")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def draw_curve(axis, steps, values, label):
    """Draw the logged values, and their mean over a window where there are enough to average."""
    window = get_window(len(values))
    means = smooth(values, window)
    if window > 1:
        axis.plot(steps, values, color="0.8", linewidth=0.8, label="each log")
        axis.plot(steps, means, label=f"{label}, mean of {window}")
    else:
        axis.plot(steps, values, "o-", markersize=4, label=label)
    return means


def draw_loss(lines, path):
    """Draw cross-entropy, its running mean, the evaluation loss and, in a second plot, the balance loss."""
    has_balance = bool(series(lines, "moe_loss")[1])
    figure, axes = new_figure(1, 2 if has_balance else 1, 12 if has_balance else 7, 4)
    steps, losses = series(lines, get_loss_key(lines))
    means = draw_curve(axes[0], steps, losses, "training")
    eval_steps, eval_losses = series(lines, "eval_loss")
    if eval_steps:
        axes[0].plot(eval_steps, eval_losses, "o-", color="C1", markersize=4, label="evaluation")
    axes[0].set(xlabel="step", ylabel="cross-entropy a token")
    if needs_log_axis(means + eval_losses):
        use_log_axis(axes[0])
    axes[0].legend()
    if has_balance:
        draw_curve(axes[1], *series(lines, "moe_loss"), "balance loss")
        axes[1].set(xlabel="step", ylabel="balance loss, weighted, all layers")
        axes[1].legend()
    for axis in axes:
        axis.grid(color="0.92")
        # Steps are integers.
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_axisbelow(True)
    return save_figure(figure, path)


def draw_expert_load(expert_lines, path):
    """Draw for each MoE layer the fraction of assignments of each expert, over the steps."""
    layers = [layer for layer in get_layers(expert_lines) if get_loads(expert_lines, layer)[1]]
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure, axes = new_figure(rows, columns, 3.2 * columns, 2.6 * rows)
    for axis, layer in zip(axes, layers, strict=False):
        steps, loads = get_loads(expert_lines, layer)
        window = get_window(len(loads))
        fractions = [smooth(curve, window) for curve in zip(*loads, strict=True)]
        axis.stackplot(steps, fractions, labels=[f"expert {i}" for i in range(len(fractions))])
        axis.set(title=f"layer {layer}", ylim=(0, 1), xlabel="step", ylabel="fraction of assignments")
    for axis in axes[len(layers) :]:
        axis.set_visible(False)
    # One legend for all layers, from the one with the most experts; topmost first, as in the plot.
    handles, labels = max(
        (axis.get_legend_handles_labels() for axis in axes[: len(layers)]), key=lambda pair: len(pair[0])
    )
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper")
    return save_figure(figure, path)
