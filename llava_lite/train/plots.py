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


def window_of(num_values):
    """Return how many values a smoothed curve averages, an odd number: one of a short run, 1 in 25 of a long one."""
    return 1 + 2 * round(num_values / 50)


def smooth(values, window):
    """Return the mean of the `window` values around each value.

    Near the start, where a loss falls steeply, as many from either side as there are before it; at the end those
    before it alone. A mean of earlier values only would lag behind the curve.
    """
    sums, half = [0.0], window // 2
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        before = min(half, i)
        after = min(before, len(values) - 1 - i)
        means.append((sums[i + 1 + after] - sums[i - before]) / (before + 1 + after))
    return means


def needs_log_axis(values):
    """Tell whether a curve falls so far that its end would lie on the axis: to a tenth or less, and above zero."""
    return bool(values) and min(values) > 0 and max(values) >= 10 * min(values)


def use_log_axis(axis):
    """Give a curve a logarithmic axis with plain numbers: 0.3, not 3 x 10^-1."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_yscale("log", nonpositive="mask")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def draw_curve(axis, steps, values, label):
    """Draw what was logged, and its mean over a window where there is enough to average."""
    window = window_of(len(values))
    means = smooth(values, window)
    if window > 1:
        axis.plot(steps, values, color="0.8", linewidth=0.8, label="each log")
        axis.plot(steps, means, label=f"{label}, mean of {window}")
    else:
        axis.plot(steps, values, "o-", markersize=4, label=label)
    return means


def draw_loss(lines, path):
    """Draw cross-entropy, its running mean, the evaluation loss and, apart, the balance loss."""
    has_balance = any("moe_loss" in line for line in lines)
    figure, axes = new_figure(1, 2 if has_balance else 1, 12 if has_balance else 7, 4)
    steps, losses = series(lines, "lm_loss" if has_balance else "loss")
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
        # Steps are whole.
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_axisbelow(True)
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
        window = window_of(len(loads))
        curves = zip(*(smooth(curve, window) for curve in zip(*(load for _, load in loads), strict=True)), strict=True)
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
