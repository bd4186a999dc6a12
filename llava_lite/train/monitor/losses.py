"""Say what the loss of a run was at its start and at its end: one rule for the terminal, the page and its findings."""

from typing import NamedTuple

from llava_lite.train.monitor.log_lines import is_number


class Ends(NamedTuple):
    """The mean loss of the first and of the last tenth of the logs. num: how many logs a tenth is, 1 at least."""

    first: float
    last: float
    num: int


def get_loss_key(lines) -> str:
    """Return the key of the cross-entropy: with experts it is logged beside the sum of both losses."""
    return "lm_loss" if any(is_number(line.get("lm_loss")) for line in lines) else "loss"


def get_losses(lines) -> list[float]:
    """Return the cross-entropies of a log that are numbers."""
    key = get_loss_key(lines)
    return [line[key] for line in lines if is_number(line.get(key))]


def get_ends(losses) -> Ends | None:
    """Return the losses at both ends of a log; None for a log without a loss."""
    if not losses:
        return None
    num = max(1, len(losses) // 10)
    return Ends(sum(losses[:num]) / num, sum(losses[-num:]) / num, num)


def loss_text(value) -> str:
    """Return a loss as text, with four digits after the point where these say something."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"
