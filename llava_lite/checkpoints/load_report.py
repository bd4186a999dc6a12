"""Turn transformers' report of a load (missing, unexpected, other shapes) into names and errors.

Every weight is accounted for; transformers itself warns and continues.
"""

from __future__ import annotations

import logging
import re
from contextlib import contextmanager

# Written by old transformers versions; the constructor computes them.
DERIVED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$|\.masked_bias$")


@contextmanager
def own_accounting():
    """Suppress transformers' report of missing weights: new parts are missing on purpose, all others raise here.

    By a log filter, the only one of this package: no argument of `from_pretrained` leaves the report out.
    """
    source = logging.getLogger("transformers.modeling_utils")

    def is_no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    source.addFilter(is_no_report)
    try:
        yield
    finally:
        source.removeFilter(is_no_report)


def missing_and_unexpected(info: dict) -> tuple[set[str], set[str]]:
    """Return the names of missing and of unexpected weights, but for those that the constructor computes."""
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    return {k for k in missing if not DERIVED.search(k)}, {k for k in unexpected if not DERIVED.search(k)}


def count_partitioned(model, shapes: dict) -> dict:
    """Return the unexpected names and the other shapes of a checkpoint {name: shape} for a model under ZeRO-3."""
    wanted = {k: tuple(getattr(v, "ds_shape", v.shape)) for k, v in model.state_dict(keep_vars=True).items()}
    others = [(k, tuple(v), wanted[k]) for k, v in shapes.items() if k in wanted and tuple(v) != wanted[k]]
    return {"unexpected_keys": shapes.keys() - wanted.keys(), "mismatched_keys": others}


def check_reported_shapes(path, mismatched: list[tuple]) -> None:
    """Raise ValueError with both shapes for weights [(name, shape in the checkpoint, shape of the model)]."""
    if mismatched:
        listed = [
            f"{name} has shape {tuple(found)}, the model expects {tuple(wanted)}"
            for name, found, wanted in sorted(mismatched)[:5]
        ]
        raise ValueError(
            f"weights of {str(path)!r} have other shapes than in config.json, {len(mismatched)} in all: "
            f"{'; '.join(listed)}. Its config.json belongs to another checkpoint, or was changed."
        )
