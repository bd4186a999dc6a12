"""Turn an answer into yes or no, and many of them into POPE's accuracy, precision, recall, F1 and share of yes.

Three programs read the same answer in three ways: LLaVA for POPE (Li et al. 2023, arXiv 2305.10355), the tool of MME
(Fu et al. 2023, arXiv 2306.13394), and lmms-eval for MME.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from llava_lite.eval.scoring.means import check_lengths

NO_WORDS = {"No", "no", "not"}


def is_yes(text: str) -> bool:
    """Return whether POPE takes an answer as a yes (LLaVA's rule): anything whose first sentence lacks a no.

    "No", "no" or "not" must stand alone between spaces, commas aside: "NO", "Nope" and "" are a yes.
    """
    words = text.partition(".")[0].replace(",", "").split(" ")
    return NO_WORDS.isdisjoint(words)


def score_pope(prediction: str, truth: str) -> float:
    """Return 1 if an answer is right under POPE's rule, else 0. truth: yes or no."""
    return float(is_yes(prediction) == is_true(truth))


def parse_mme(text: str) -> str:
    """Return yes, no or other (the tool of MME): what the first four characters hold, in lower case."""
    head = text.lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def parse_mme_lmms(text: str) -> str:
    """Return yes, no or other (lmms-eval): as `parse_mme` without points and outer spaces; y and n count too."""
    text = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or parse_mme(text)


def is_true(truth: str) -> bool:
    """Return whether a truth is yes; ValueError for anything but yes and no, in any case."""
    if truth.strip().lower() not in ("yes", "no"):
        raise ValueError(f"the truth of a question is {truth!r}; expected yes or no.")
    return truth.strip().lower() == "yes"


@dataclass(frozen=True)
class YesNoCounts:
    """How many answers are right and wrong; yes is positive. A figure whose denominator is 0 is 0."""

    true_positives: int = 0
    false_positives: int = 0
    true_negatives: int = 0
    false_negatives: int = 0

    @property
    def num_questions(self) -> int:
        """Return the number of questions."""
        return self.true_positives + self.false_positives + self.true_negatives + self.false_negatives

    @property
    def accuracy(self) -> float:
        """Return the fraction of right answers."""
        return ratio(self.true_positives + self.true_negatives, self.num_questions)

    @property
    def precision(self) -> float:
        """Return the fraction of right answers among those that say yes."""
        return ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        """Return the fraction of questions with the truth yes that are answered with yes."""
        return ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float:
        """Return the harmonic mean of precision and recall."""
        return ratio(2 * self.precision * self.recall, self.precision + self.recall)

    @property
    def yes_ratio(self) -> float:
        """Return the fraction of answers that say yes."""
        return ratio(self.true_positives + self.false_positives, self.num_questions)


def count_yes_no(answers: Sequence[str], truths: Sequence[bool]) -> YesNoCounts:
    """Return the counts of answers under POPE's rule. truths: whether yes is right; ValueError for unequal lengths."""
    check_lengths(answers=answers, truths=truths)
    pairs = [(is_yes(answer), bool(truth)) for answer, truth in zip(answers, truths, strict=True)]
    return YesNoCounts(*(pairs.count(pair) for pair in ((True, True), (True, False), (False, False), (False, True))))


def mean_f1(parts: Sequence[YesNoCounts]) -> float:
    """Return the mean F1 of the parts, 0 to 1, which papers report as POPE; the F1 of all answers differs from it."""
    return fmean(part.f1 for part in parts)


def ratio(numerator: float, denominator: float) -> float:
    """Return a quotient; 0 for the denominator 0, where LLaVA's program fails."""
    return numerator / denominator if denominator else 0.0
