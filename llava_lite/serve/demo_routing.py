"""Turn the expert load of a prompt into a chart in HTML: where image and text tokens went, layer by layer."""

from html import escape

# Colours that keep apart for most eyes (Okabe and Ito 2008), dark text on each; the ninth expert has the first again.
COLOURS = ("#56b4e9", "#e69f00", "#2fb890", "#f0e442", "#7ba7d9", "#e8845a", "#d89bc0", "#b8b8b8")
LEAST_LABELLED = 0.08


def routing_html(found: dict) -> str:
    """Return the chart of what eval.expert_routes.routes counted: a bar for image tokens and one for text a layer.

    A segment is the fraction of all K assignments of these tokens that an expert got; its title says how many got it
    as their first.
    """
    first = next(iter(found.values()))
    counts = " and ".join(f"{load.num_tokens:,} {kind} tokens" for kind, load in first.items() if load.num_tokens)
    most = max(len(load.all_k) for loads in found.values() for load in loads.values())
    keys = "".join(f'<span><i style="background:{_colour(i)}"></i>expert {i}</span>' for i in range(most))
    rows = "".join(_layer(layer, loads) for layer, loads in found.items())
    return (
        f'<details class="routing" open><summary>Where tokens went</summary><p>Fraction of the assignments of '
        f'{escape(counts)} (the last prompt) that each expert got, by layer.</p><div class="routing-key">{keys}</div>'
        f"{rows}</details>"
    )


def _layer(layer: int, loads: dict) -> str:
    bars = "".join(_bar(layer, kind, load) for kind, load in loads.items() if load.num_tokens)
    return f'<div class="routing-layer"><b>layer {layer}</b><div>{bars}</div></div>'


def _bar(layer: int, kind: str, load) -> str:
    segments = "".join(
        f'<span style="width:{share * 100:.2f}%;background:{_colour(i)}" title="layer {layer}, {kind} tokens, expert '
        f'{i}: {share:.1%} of assignments, {load.first[i]:.1%} of first ones">'
        f"{f'{share:.0%}' if share >= LEAST_LABELLED else ''}</span>"
        for i, share in enumerate(load.all_k)
        if share
    )
    return f'<div class="routing-row"><em>{escape(kind)}</em><div class="routing-bar">{segments}</div></div>'


def _colour(expert: int) -> str:
    return COLOURS[expert % len(COLOURS)]
