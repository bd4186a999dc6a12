"""Turn an answer to a chart question into right or wrong: relaxed accuracy, 5% of tolerance for numbers.

ChartQA (Masry et al. 2022, arXiv 2203.10244, section 5.1), by the rule of Pix2Struct, which lmms-eval and VLMEvalKit
share. The answer is compared as it is: commas and currency signs make a number a text.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava_lite.eval.scoring.means import mean, means_by

TOLERANCE = 0.05


def score(prediction: str, truth: str, tolerance: float = TOLERANCE) -> float:
    """Return 1 if an answer is right, else 0.

    Right is a number within `tolerance` of the truth, as a fraction of the truth. Where one of them is no number, or
    the truth is 0, the same text in any case is right.
    """
    number, true_number = to_number(prediction), to_number(truth)
    if number is not None and true_number:
        return float(abs(number - true_number) / abs(true_number) <= tolerance)
    return float(prediction.lower() == truth.lower())


def to_number(text: str) -> float | None:
    """Return the number that a text is, a hundredth of it before a %; None for another text."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def aggregate(scores: Sequence[float], parts: Sequence[str]) -> dict[str, float]:
    """Return the relaxed accuracy of all questions and of each part. parts: human or augmented for each question."""
    return {"overall": mean(scores), **means_by(scores, parts)}
