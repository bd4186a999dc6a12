"""Draw the curves of a run as SVG inside the page: its colours are the page's, so they follow light and dark."""

import io
import re

import numpy as np

from llava_lite.train.monitor.plots import (
    get_layers,
    get_loads,
    get_window,
    needs_log_axis,
    new_figure,
    smooth,
    use_log_axis,
)
from llava_lite.train.monitor.report.html import Html, join, tag, text
from llava_lite.train.monitor.report.words import short

# What matplotlib draws in -> the variable of the page's style that it becomes.
INK, RULE, FAINT = "#010101", "#010102", "#010103"
LINES = [f"#0102{i:02x}" for i in range(8)]
COLOURS = {INK: "--ink", RULE: "--rule", FAINT: "--faint"} | {one: f"--c{i}" for i, one in enumerate(LINES)}
# Inches and points: an axis label is 11 pixels high on a telephone, and 16 in a column of 500 pixels.
WIDTH, HEIGHT, FONT = 4.6, 2.5, 10
MOST_POINTS = 600
# Curves whose axis begins with 0: what they are in all counts, not how they change.
FROM_ZERO = ("learning_rate", "tokens_per_s")
# Curves without noise.
EXACT = ("learning_rate",)
# More experts than lines can be told apart: a map of colours instead.
MOST_LINES = len(LINES)


def thin(steps, values, most: int = MOST_POINTS) -> tuple[list, list]:
    """Return the lowest and highest value of each piece of a long curve, in order, so that no spike is lost."""
    if len(values) <= most:
        return list(steps), list(values)
    kept = set()
    for piece in np.array_split(np.arange(len(values)), most // 2):
        among = [values[i] for i in piece]
        kept |= {int(piece[np.argmin(among)]), int(piece[np.argmax(among)])}
    return [steps[i] for i in sorted(kept)], [values[i] for i in sorted(kept)]


def even(items, most: int = MOST_POINTS) -> list:
    """Return evenly spaced items of a list, the first and the last included."""
    if not items:
        return []
    places = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[i] for i in np.unique(places)]


def new_axis():
    """Return a figure and its axis in the colours of the page."""
    figure, (axis,) = new_figure(1, 1, WIDTH, HEIGHT)
    figure.patch.set_visible(False)
    axis.patch.set_visible(False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(RULE)
    axis.grid(color=RULE, linewidth=0.5)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, labelsize=FONT, length=0, pad=5)
    axis.set_xlabel("step", color=INK, fontsize=FONT)
    axis.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axis.xaxis.set_major_formatter(lambda value, _: short(value))
    return figure, axis


def to_svg(figure, name: str, words: str) -> Html:
    """Return a figure as an SVG element. name: what its ids begin with; words: what a screen reader says."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{name}-", svg)
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    # The size is that of the page's column; an inline SVG needs no names of formats.
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{text(words)}">', svg, count=1
    )
    return Html(svg)


def legend(entries) -> Html | None:
    """Return (colour variable, kind, words) of the lines as a legend; None for a single one."""
    items = [
        tag("span", tag("i", class_=kind, style=f"--k: var({variable})"), words) for variable, kind, words in entries
    ]
    return tag("p", *items, class_="legend") if len(items) > 1 else None


def chart(svg: Html, title: str, unit: str = "", key: Html | None = None) -> Html:
    """Return a chart with its title, unit and legend."""
    caption = tag("figcaption", tag("strong", title), tag("span", f" {unit}") if unit else None, key)
    return tag("figure", caption, svg, class_="chart")


def curve(run, key: str, title: str, unit: str, name: str, more: str | None = None) -> Html | None:
    """Return the chart of a key of the log, raw and smoothed, with that of the evaluation; None without numbers.

    more: a key that the evaluations log.
    """
    steps, values = run.series(key)
    if not values:
        return None
    figure, axis = new_axis()
    window = 1 if key in EXACT else get_window(len(values))
    means = smooth(values, window)
    entries = [("--c0", "line", f"mean of {window} logs" if window > 1 else "training")]
    if window > 1:
        axis.plot(*thin(steps, values), color=FAINT, linewidth=0.7)
        entries.insert(0, ("--faint", "line", "each log"))
    marker = {"marker": "o", "markersize": 3} if len(values) < 30 else {}
    axis.plot(even(steps), even(means), color=LINES[0], linewidth=1.6, **marker)
    others = run.series(more) if more else ([], [])
    if others[1]:
        axis.plot(even(others[0]), even(others[1]), color=LINES[1], linewidth=1.4, marker="o", markersize=3.5)
        entries.append(("--c1", "line", "evaluation"))
    if key in FROM_ZERO and min(values) >= 0:
        axis.set_ylim(0, 1.08 * max(values) or 1)
    elif needs_log_axis(means + others[1]):
        use_log_axis(axis)
        unit = f"{unit}, logarithmic" if unit else "logarithmic"
    axis.yaxis.set_major_formatter(lambda value, _: short(value))
    words = f"{title}: {values[0]:.4g} at step {steps[0]:,}, {values[-1]:.4g} at step {steps[-1]:,}"
    return chart(to_svg(figure, name, words), title, unit, legend(entries))


def lengths(histogram, name: str) -> Html:
    """Return the histogram of the lengths of records. histogram: counts, and edges, which are one more."""
    counts, edges = histogram["counts"], histogram["edges"]
    figure, axis = new_axis()
    axis.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=LINES[0], linewidth=0)
    axis.grid(visible=False, axis="x")
    axis.set_xlabel("tokens of a record", color=INK, fontsize=FONT)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.set_major_formatter(lambda value, _: short(value))
    words = f"Histogram of {sum(counts):,} records of {edges[0]:,.0f} to {edges[-1]:,.0f} tokens"
    return chart(
        to_svg(figure, f"lengths-{name}", words), "Lengths", "records by their tokens, image features included"
    )


def expert_charts(run) -> Html | None:
    """Return the load of the experts over the steps, a chart for each MoE layer; None for a dense model."""
    layers = get_layers(run.expert_lines)
    charts = [one for layer in layers if (one := layer_chart(run.expert_lines, layer)) is not None]
    if not charts:
        return None
    most = max(len(load) for layer in layers for load in get_loads(run.expert_lines, layer)[1])
    if most > MOST_LINES:
        key = tag("p", tag("span", "0", tag("i", class_="ramp"), "twice the even share or more"), class_="legend")
    else:
        key = legend([("--faint", "dashed", "even share"), *((f"--c{i}", "line", f"expert {i}") for i in range(most))])
    return join(key, tag("div", *charts, class_="charts"))


def layer_chart(expert_lines, layer: str) -> Html | None:
    """Return the load of the experts of a layer: lines, or a map of colours where there are many."""
    steps, loads = get_loads(expert_lines, layer)
    if not loads:
        return None
    window, num_experts = get_window(len(loads)), len(loads[-1])
    curves = [smooth(one, window) for one in zip(*loads, strict=True)]
    figure, axis = new_axis()
    if num_experts > MOST_LINES:
        kept = even(range(len(steps)), 200)
        shares = np.array([[one[i] * num_experts for i in kept] for one in curves])  # [E, steps]
        reach = (steps[0], max(steps[-1], steps[0] + 1), num_experts - 0.5, -0.5)
        axis.imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=2, extent=reach, interpolation="nearest")
        axis.grid(visible=False)
        axis.yaxis.get_major_locator().set_params(integer=True)
        unit = "number of the expert; the colour is its load"
    else:
        axis.axhline(1 / num_experts, color=FAINT, linewidth=1, linestyle="--")
        marker = {"marker": "o", "markersize": 2.5} if len(loads) < 30 else {}
        for i, one in enumerate(curves):
            axis.plot(even(steps, 200), even(one, 200), color=LINES[i], linewidth=1.3, **marker)
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        unit = "of the assignments"
    last = ", ".join(f"expert {i} {one[-1]:.0%}" for i, one in enumerate(curves[:MOST_LINES]))
    words = f"Load of {num_experts} experts of layer {layer}; at the last log {last}"
    return chart(to_svg(figure, f"layer{re.sub(r'[^0-9a-zA-Z]', '', layer)}", words), f"Layer {layer}", unit)
