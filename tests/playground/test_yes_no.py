"""Questions whose answer is yes or no, beside the scene that they are about."""

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the tiny world is drawn from scikit-learn's digits: pip install scikit-learn")

from playground.tiny import world, yes_no

# Digits top-left and bottom-right.
DIGIT = np.array([3, world.EMPTY, world.EMPTY, 7])
RIGHT = {
    "existence": {"Is there a digit top-left?", "Is there a digit bottom-right?"},
    "count": {"Are there two digits?"},
}
WRONG = {
    "existence": {"Is there a digit top-right?", "Is there a digit bottom-left?"},
    "count": {"Are there one digits?", "Are there three digits?", "Are there four digits?"},
}


@pytest.mark.parametrize("kind", yes_no.YES_NO)
def test_what_holds_is_asked_with_yes_and_what_does_not_with_no(kind):
    rng = np.random.default_rng(0)
    for holds, texts, answer in ((True, RIGHT, "yes"), (False, WRONG, "no")):
        asked = [yes_no.yes_no_question(kind, DIGIT, holds, rng) for _ in range(60)]
        assert {question.text for question in asked} == texts[kind]
        assert {question.answer for question in asked} == {answer}
