"""Turn answers to MMBench into its circular score: a question counts if it is answered under every rotation.

MMBench (Liu et al. 2023, arXiv 2307.06281, section 4.3, CircularEval). The k-th rotation of the options of question
`index` is a line of its own with the index k * 1,000,000 + `index`. How a letter is read stands in letters.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava_lite.eval.scoring.means import check_lengths, mean, means_by

STEP = 1_000_000


def get_group(index: int) -> int:
    """Return the index of the base question of a line."""
    return index % STEP


def circular_scores(indices: Sequence[int], scores: Sequence[float]) -> dict[int, float]:
    """Return {base index: 1 if all its rotations are right, else 0}, in the order in which groups appear.

    Raises ValueError for an index that stands twice and for a rotation that is missing between others: without it the
    group would count as right too easily. A missing last rotation cannot be seen here.
    """
    check_lengths(indices=indices, scores=scores)
    groups: dict[int, dict[int, float]] = {}
    for index, score in zip(indices, scores, strict=True):
        rotations = groups.setdefault(get_group(index), {})
        if index in rotations:
            raise ValueError(f"index {index} stands twice; expected one answer for each line of MMBench.")
        rotations[index] = score
    for base, rotations in groups.items():
        missing = [base + k * STEP for k in range(len(rotations)) if base + k * STEP not in rotations]
        if missing:
            raise ValueError(
                f"question {base} has answers to {len(rotations)} rotations, and none to index {missing[0]}. Answer "
                "all its rotations, or leave the question out."
            )
    return {base: float(min(rotations.values()) == 1) for base, rotations in groups.items()}


def aggregate(
    indices: Sequence[int], scores: Sequence[float], categories: Sequence[str], l2_categories: Sequence[str]
) -> dict[str, float | dict[str, float]]:
    """Return the circular score of all base questions and of each category, and "vanilla", 0 to 1.

    indices, scores, categories, l2_categories: of each line; a group has the categories of its base line. "vanilla" is
    the mean over base lines alone, another figure that some report. Errors as in `circular_scores`.
    """
    check_lengths(indices=indices, scores=scores, categories=categories, l2_categories=l2_categories)
    circular = circular_scores(indices, scores)
    lines = {index: i for i, index in enumerate(indices)}
    bases, values = [lines[base] for base in circular], list(circular.values())
    return {
        "overall": mean(values),
        "vanilla": mean([scores[i] for i in bases]),
        "category": means_by(values, [categories[i] for i in bases]),
        "l2-category": means_by(values, [l2_categories[i] for i in bases]),
    }
