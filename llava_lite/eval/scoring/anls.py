"""Turn an answer about a document into a score: ANLS, how much of the nearest truth it spells.

Average normalised Levenshtein similarity (Biten et al. 2019, arXiv 1905.13648), by the rule of lmms-eval, which is
Qwen-VL's. M4C divides by the length of the cleaned texts instead.
"""

from __future__ import annotations

from collections.abc import Sequence

THRESHOLD = 0.5


def score(prediction: str, truths: Sequence[str], threshold: float = THRESHOLD) -> float:
    """Return the ANLS of an answer, 0 to 1, for the nearest of several truths; below `threshold` it is 0.

    Texts are compared in lower case with single spaces, the distance is divided by the longer of the texts as they
    came. Raises ValueError without truths.
    """
    if isinstance(truths, str) or not truths:
        raise ValueError(f"ANLS compares with a list of one truth or more; got {truths!r}.")
    similarity = 1 - min(distance_ratio(prediction, truth) for truth in truths)
    return similarity if similarity >= threshold else 0.0


def distance_ratio(prediction: str, truth: str) -> float:
    """Return the edit distance of two texts as a fraction of the longer one; 0 for two empty ones."""
    # lmms-eval measures the text in upper case, where some letters are two: a German sharp s becomes SS.
    length = max(len(prediction.upper()), len(truth.upper()))
    return edit_distance(clean(prediction), clean(truth)) / length if length else 0.0


def clean(text: str) -> str:
    """Return a text in lower case with single spaces, none at its ends."""
    return " ".join(text.lower().split())


def edit_distance(first: str, second: str) -> int:
    """Return how many insertions, deletions and replacements of a character lead from one text to the other."""
    row = list(range(len(second) + 1))  # of the first i characters of `first` to each beginning of `second`
    for i, left in enumerate(first, 1):
        above, row = row, [i]
        for j, right in enumerate(second, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (left != right)))
    return row[-1]
