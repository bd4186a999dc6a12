"""Turn scores of questions into their mean, and into the means of their kinds."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from statistics import fmean
from typing import TypeVar

Kind = TypeVar("Kind", bound=Hashable)


def mean(scores: Sequence[float]) -> float:
    """Return the mean; ValueError without scores."""
    if not len(scores):
        raise ValueError("0 scores have no mean; expected the score of one question or more.")
    return fmean(scores)


def means_by(scores: Sequence[float], kinds: Sequence[Kind]) -> dict[Kind, float]:
    """Return {kind: mean of its scores}, in the order in which the kinds appear; ValueError for unequal lengths."""
    return {kind: fmean(found) for kind, found in group_by(scores, kinds).items()}


def group_by(values: Sequence, kinds: Sequence[Kind]) -> dict[Kind, list]:
    """Return {kind: its values}, in the order in which the kinds appear; ValueError for unequal lengths."""
    check_lengths(scores=values, kinds=kinds)
    groups: dict[Kind, list] = {}
    for value, kind in zip(values, kinds, strict=True):
        groups.setdefault(kind, []).append(value)
    return groups


def check_lengths(**lists: Sequence) -> None:
    """Raise ValueError with all lengths unless they are equal; unequal lists would be paired wrongly in silence."""
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{length:,} {name}" for name, length in lengths.items())
        raise ValueError(f"{found}: expected one of each for every question.")
