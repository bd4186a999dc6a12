"""Turn the answer to a multiple-choice question into a letter, by the rule of each benchmark.

SEED-Bench and ScienceQA as LLaVA's programs do, MMBench and Q-Bench as lmms-eval does. MMMU's rule is in mmmu.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from llava_lite.eval.scoring.means import check_lengths, mean, means_by
from llava_lite.eval.scoring.mmmu import parse_choice

LETTERS = "ABCDE"
# The last point of the pattern is any character in LLaVA's program too; it has to be there.
SCIENCEQA_SENTENCE = re.compile(r"The answer is ([A-Z]).")
# What may stand around the letter in a word of an answer to MMBench, tried in this order.
MMBENCH_FORMS = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
# In a longer answer a lone A may be the article.
MAX_WORDS_WITH_A = 3


def score_seed(prediction: str, truth: str) -> float:
    """Return 1 if an answer to SEED-Bench is exactly the letter of the truth, else 0 (LLaVA's rule)."""
    return float(prediction == truth)


def aggregate_seed(scores: Sequence[float], kinds: Sequence[str], types: Sequence[str]) -> dict[str, float]:
    """Return the accuracy of all questions, of those about images and about videos, and of each type, 0 to 1.

    kinds: image or video for each question; types: such as Scene Understanding.
    """
    return {"total": mean(scores), **means_by(scores, kinds), **means_by(scores, types)}


def parse_scienceqa(prediction: str, num_choices: int) -> int:
    """Return the index of the choice that an answer to ScienceQA names, -1 if it names none (LLaVA's rule).

    An answer is a bare letter, a letter with a point and a space, or holds "The answer is X." once.
    """
    sentences = SCIENCEQA_SENTENCE.findall(prediction)
    if len(prediction) == 1:
        letter = prediction
    elif len(prediction) >= 3 and prediction[0] in LETTERS and prediction[1:3] == ". ":
        letter = prediction[0]
    else:
        letter = sentences[0] if len(sentences) == 1 else ""
    return LETTERS[:num_choices].find(letter) if letter else -1


def score_scienceqa(prediction: str, truth: int, num_choices: int) -> float:
    """Return 1 if an answer names the choice with the index `truth`, else 0."""
    return float(parse_scienceqa(prediction, num_choices) == truth)


def aggregate_scienceqa(scores: Sequence[float], has_image: Sequence[bool]) -> dict[str, float]:
    """Return the accuracy of all questions and of those with an image, 0 to 1; papers report the latter.

    Give all questions of the split, 0 for those without an answer. Without images "image" is left out.
    """
    check_lengths(scores=scores, has_image=has_image)
    with_image = [score for score, image in zip(scores, has_image, strict=True) if image]
    return {"all": mean(scores), **({"image": mean(with_image)} if with_image else {})}


def parse_mmbench(prediction: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that an answer to MMBench names, None if that is not clear.

    The rule of lmms-eval without its judge: exactly one of A to E as a word of its own, then exactly one with the same
    marks around it, then exactly one option whose text the answer holds. Where lmms-eval asks GPT
    this gives None, which counts as wrong; MMBench's server asks GPT too, and its score may be higher.
    options: {letter: text}, without empty ones.
    """
    words = prediction.split()
    for form in ("{}", *MMBENCH_FORMS):
        named = [letter for letter in LETTERS if form.format(letter) in words]
        if len(named) == 1 and not (form == "{}" and named == ["A"] and len(words) > MAX_WORDS_WITH_A):
            return named[0]
    lower = prediction.lower()
    named = [letter for letter, text in options.items() if text and text.lower() in lower]
    return named[0] if len(named) == 1 else None


def score_mmbench(prediction: str, truth: str, options: Mapping[str, str]) -> float:
    """Return 1 if an answer names the letter of the truth, else 0."""
    return float(parse_mmbench(prediction, options) == truth)


def parse_qbench(
    prediction: str, options: Mapping[str, str], draw: Callable[[Sequence[str]], str] | None = None
) -> str | None:
    """Return the letter that an answer to Q-Bench names; arguments as in `parse_choice`, in lmms-eval's form."""
    return parse_choice(prediction, options, draw, form="lmms")


def score_qbench(
    prediction: str,
    truth: str,
    options: Mapping[str, str],
    draw: Callable[[Sequence[str]], str] | None = None,
) -> float:
    """Return 1 if an answer names the letter of the truth, else 0."""
    return float(parse_qbench(prediction, options, draw) == truth)
