"""Count what a run took: time, tokens, device hours, memory, MFU, as far as its log has them."""

from llava_lite.train.monitor.log_lines import is_number
from llava_lite.train.monitor.report.words import time_line

EXPLAINED = "model FLOPs utilisation: without attention scores, padding and recomputed activations"

# A rate below it, in tokens a second, is none: the time of a line would be too long for a number.
SLOWEST = 1e-6


class Cost:
    """The cost of a run.

    rate, mfu: means over time. seconds: of the whole run if is_complete, else of the steps that are logged.
    """

    def __init__(self, run):
        self.run, self.ranks = run, run.ranks
        lines = [line for line in run.lines if is_number(line.get("tokens_per_s")) and line["tokens_per_s"] >= SLOWEST]
        # Earlier versions logged the rate alone; a line is then as good as another.
        tokens = [line["tokens"] if is_number(line.get("tokens")) else None for line in lines]
        known = bool(tokens) and None not in tokens
        weights = (
            [num / line["tokens_per_s"] for num, line in zip(tokens, lines, strict=True)]
            if known
            else [1.0] * len(lines)
        )
        self.tokens = sum(tokens) if known else None
        self.rate, self.mfu = (mean(lines, weights, key) for key in ("tokens_per_s", "mfu"))
        self.padding = get_padding(lines)
        whole = run.last("train_runtime")
        self.is_complete = whole is not None
        self.seconds = whole if self.is_complete else sum(weights) / self.ranks if known and self.ranks else None

    def rows(self) -> list[tuple[str, str]]:
        """Return (what, how much) for the page; what is not logged is left out."""
        run, found = self.run, []
        if self.seconds:
            found.append(("time", time_line(self.seconds) + ("" if self.is_complete else ", the steps alone")))
        evaluating = sum(run.series("eval_runtime")[1])
        if evaluating:
            found.append(("of it evaluation", time_line(evaluating)))
        if self.seconds and self.ranks:
            found.append(
                ("device hours", f"{self.seconds * self.ranks / 3600:.3g} ({self.ranks} x {time_line(self.seconds)})")
            )
        if self.tokens:
            found.append(("tokens trained on", f"{self.tokens:,}"))
        if self.padding is not None:
            found.append(("padding", f"{self.padding:.1%}, if records are padded to the longest of their batch"))
        records = sum(run.series("records")[1])
        if records:
            found.append(("records trained on", f"{records:,}, repeats counted"))
        if self.rate:
            found.append(("speed", f"{self.rate:,.0f} tokens/s a device"))
        if self.mfu is not None:
            found.append(("MFU", f"{self.mfu:.1%} ({EXPLAINED})"))
        flops = run.last("total_flos") or run.state.get("total_flos")
        if flops and is_number(flops):
            found.append(("work", f"{flops:.3g} FLOPs"))
        memory = run.record.get("end", {}).get("memory_gib")
        if memory and is_number(memory):
            found.append(("peak memory", f"{memory:.1f} GiB of a device, or of a process on a CPU"))
        return found


def mean(lines, weights, key: str) -> float | None:
    """Return the mean of a key of the log, weighted; None where no line has it."""
    pairs = [(line[key], weight) for line, weight in zip(lines, weights, strict=True) if is_number(line.get(key))]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None


def get_padding(lines) -> float | None:
    """Return the fraction of padding if batches were padded, None where the log does not say."""
    both = ("tokens", "padded_tokens")
    pairs = [[line[key] for key in both] for line in lines if all(is_number(line.get(key)) for key in both)]
    padded = sum(total for _, total in pairs)
    return 1 - sum(tokens for tokens, _ in pairs) / padded if padded else None
