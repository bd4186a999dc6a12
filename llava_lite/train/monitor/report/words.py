"""Turn numbers, dates and prompts into the words of the page."""

from llava_lite.train.monitor.log_lines import is_number


def count(number, noun: str) -> str:
    """Return a number with its noun: 1 step, 1,200 steps."""
    return f"{number:,g} {noun}{'s' * (number != 1)}" if number < 1e6 else f"{number:,} {noun}s"


def time_line(seconds: float) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds < 99.5:
        return count(round(seconds), "second")
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def big(value: float) -> str:
    """Return a large number in short: 12.3 million."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,.0f}"


def number(value) -> str:
    """Return a figure of a table; a score that is None was not computed."""
    if value is None:
        return "not scored here"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def logged(value, key: str) -> str:
    """Return a number of the log; what is none, or too large to be drawn, as the log has it."""
    if not is_number(value):
        return "" if value is None else f"{str(value)[:20]}{'...' * (len(str(value)) > 20)}"
    return (
        f"{value:.1%}" if key in ("mfu", "dropped") else f"{value:,.0f}" if key == "tokens_per_s" else f"{value:.4g}"
    )


def clock(date) -> str:
    """Return a date of ISO 8601 as it is read: 2026-01-31 12:00; "" for None."""
    return str(date or "")[:16].replace("T", " ")


def span(first, last) -> str:
    """Return the time between two dates; the day once if it is the same."""
    first, last = clock(first), clock(last)
    return f"{first} to {last[11:] if first[:10] == last[:10] else last}"


def short(value: float) -> str:
    """Return a number for an axis: 1,500, 20k, 0.002, 2e-05."""
    if abs(value) >= 10_000:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    return f"{value:,.0f}" if value == round(value) else f"{value:g}"


def with_flags(settings: dict) -> list[tuple[str, str]]:
    """Return (flag, value) as they would be typed."""
    return [
        (f"--{name}", " ".join(map(str, value)) if isinstance(value, list) else str(value))
        for name, value in sorted(settings.items())
        if value is not None
    ]
