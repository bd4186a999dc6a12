"""Turn answers to GQA into accuracy: the exact word, and its means over kinds of questions.

GQA (Hudson and Manning 2019, arXiv 1902.09506). The answer is cleaned as LLaVA's converter does before GQA's own
program sees it. Validity, plausibility and distribution need files that version 1.2 of GQA lacks.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava_lite.eval.scoring.means import mean, means_by

OPEN = "query"


def normalize(text: str) -> str:
    """Return an answer in lower case without points at its end (LLaVA's converter)."""
    return text.rstrip(".").lower()


def score(prediction: str, truth: str) -> float:
    """Return 1 if a cleaned answer is the truth, else 0. The truth is taken as it is: GQA writes it in lower case."""
    return float(normalize(prediction) == truth)


def aggregate(
    scores: Sequence[float], structural: Sequence[str] | None = None, semantic: Sequence[str] | None = None
) -> dict[str, float | dict[str, float]]:
    """Return accuracy, its part for binary and for open questions, and the accuracy of each type, 0 to 1.

    structural, semantic: the types of each question, None where they are not known; a question of the structural type
    "query" is open, any other binary. Parts without questions are left out. GQA's own program takes balanced questions
    alone.
    """
    table: dict[str, float | dict[str, float]] = {"accuracy": mean(scores)}
    if structural is not None:
        table |= means_by(scores, ["open" if kind == OPEN else "binary" for kind in structural])
        table["structural"] = means_by(scores, structural)
    if semantic is not None:
        table["semantic"] = means_by(scores, semantic)
    return table
