"""Turn scores of questions into the 95% interval of their mean, or of any other figure made of them.

Wilson's interval (1927, JASA 22) for scores of 0 and 1, the percentile bootstrap (Efron and Tibshirani 1993, chapter
13) otherwise. Questions that share an image or rotate the same options are drawn together, as groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist

import numpy as np

from llava_lite.eval.scoring.means import check_lengths

LEVEL = 0.95
NUM_RESAMPLES = 1000


def mean_interval(
    scores: Sequence[float], groups: Sequence[Hashable] | None = None, level: float = LEVEL, seed: int = 0
) -> tuple[float, float]:
    """Return the interval of the mean of scores: Wilson's for 0 and 1 without groups, else the bootstrap's.

    groups: a label for each score; equal labels are drawn together, such as the two questions about an image. Raises
    ValueError without scores and for a score that is no finite number.
    """
    values = np.asarray(scores, dtype=np.float64)  # [questions]
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(
            f"{int(np.isfinite(values).sum())} of {len(values)} scores are finite numbers; expected one score or "
            "more, all finite."
        )
    if groups is None and np.isin(values, (0, 1)).all():
        return wilson_interval(int(values.sum()), len(values), level)
    if groups is None:
        return bootstrap_interval(len(values), lambda chosen: values[chosen].mean(), level=level, seed=seed)
    check_lengths(scores=scores, groups=groups)
    labels = number_labels(groups)
    sums, sizes = np.bincount(labels, values), np.bincount(labels)  # [groups]
    return bootstrap_interval(
        len(sums), lambda chosen: sums[chosen].sum() / sizes[chosen].sum(), level=level, seed=seed
    )


def wilson_interval(num_right: int, num_questions: int, level: float = LEVEL) -> tuple[float, float]:
    """Return Wilson's interval of a fraction, within 0 and 1. Raises ValueError unless 0 <= right <= questions > 0."""
    if not (num_questions > 0 and 0 <= num_right <= num_questions):
        raise ValueError(f"{num_right} right of {num_questions} questions is no fraction.")
    z, fraction = NormalDist().inv_cdf((1 + level) / 2), num_right / num_questions
    shrink = 1 + z * z / num_questions
    centre = (fraction + z * z / (2 * num_questions)) / shrink
    half = z / shrink * math.sqrt(fraction * (1 - fraction) / num_questions + (z / (2 * num_questions)) ** 2)
    # At the ends one bound is exact, which rounding misses.
    low = 0.0 if num_right == 0 else centre - half
    return low, 1.0 if num_right == num_questions else centre + half


def bootstrap_interval(
    count: int,
    statistic: Callable[[np.ndarray], float],
    groups: Sequence[Hashable] | None = None,
    strata: Sequence[Hashable] | None = None,
    level: float = LEVEL,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval of a figure over draws of the questions with replacement.

    statistic: takes the indices of the drawn questions, [count] (with groups of unequal sizes about as many), and
    returns the figure. groups: a label for each question; equal ones, within a stratum, are drawn together. strata: a
    label for each question, such as its part or task; as many groups are drawn of each as it has. The same seed gives
    the same interval. Raises ValueError without questions.
    """
    if count < 1:
        raise ValueError("0 questions have no interval; expected one or more.")
    draw = make_draw(count, groups, strata)
    generator = np.random.default_rng(seed)
    figures = [statistic(draw(generator)) for _ in range(num_resamples)]
    low, high = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def make_draw(
    count: int, groups: Sequence[Hashable] | None, strata: Sequence[Hashable] | None
) -> Callable[[np.random.Generator], np.ndarray]:
    """Return a function: generator -> indices of one draw; ValueError for lists of another length than `count`."""
    given = {name: labels for name, labels in (("groups", groups), ("strata", strata)) if labels is not None}
    check_lengths(questions=range(count), **given)
    if strata is None:
        strata = [None] * count
    if groups is None:
        parts = split_by(strata)

        def draw_questions(generator):
            return np.concatenate([part[generator.integers(len(part), size=len(part))] for part in parts])

        return draw_questions
    members = split_by(list(zip(strata, groups, strict=True)))
    draw_members = make_draw(len(members), None, [strata[group[0]] for group in members])
    return lambda generator: np.concatenate([members[group] for group in draw_members(generator)])


def split_by(labels: Sequence[Hashable]) -> list[np.ndarray]:
    """Return the indices of each label, in the order in which labels appear."""
    numbers = number_labels(labels)
    order = np.argsort(numbers, kind="stable")
    return np.split(order, np.cumsum(np.bincount(numbers))[:-1])


def number_labels(labels: Sequence[Hashable]) -> np.ndarray:
    """Return the number of each label, [count]: 0 for the first one, 1 for the next other one."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels])
