"""Yes or no by three programs, and POPE's figures."""

import pytest

from llava_lite.eval.scoring.yes_no import (
    YesNoCounts,
    count_yes_no,
    is_true,
    is_yes,
    mean_f1,
    parse_mme,
    parse_mme_lmms,
    score_pope,
)

# What LLaVA's POPE, the tool of MME and lmms-eval's MME make of an answer.
TABLE = [
    ("NO", "yes", "no", "no"),
    ("No!", "yes", "no", "no"),
    ('"No"', "yes", "no", "no"),
    ("Nope", "yes", "no", "no"),
    ("No\n", "yes", "no", "no"),
    ("Not sure", "yes", "no", "no"),
    ("Know", "yes", "no", "no"),
    ("Nothing", "yes", "no", "no"),
    ("It does not", "no", "other", "other"),
    ("Yes. No dog", "yes", "yes", "yes"),
    ("The answer is yes", "yes", "other", "other"),
    ("y", "yes", "other", "yes"),
    ("", "yes", "other", "other"),
    # Beyond the table of the facts.
    ("No", "no", "no", "no"),
    ("no", "no", "no", "no"),
    ("No.", "no", "no", "no"),
    ("No, there is none", "no", "no", "no"),
    ("n", "yes", "other", "no"),
    ("x", "yes", "other", "other"),
    ("Yes", "yes", "yes", "yes"),
    ("Yes, not a cat", "no", "yes", "yes"),
    (".no", "yes", "no", "no"),
    (" no", "no", "no", "no"),
    ("   no", "no", "other", "no"),
    ("...no", "yes", "other", "no"),
    ("y.", "yes", "other", "yes"),
    ("there\nis no cat", "no", "other", "other"),
    ("нет", "yes", "other", "other"),
]


@pytest.mark.parametrize(("text", "pope", "mme", "lmms"), TABLE, ids=[repr(row[0]) for row in TABLE])
def test_an_answer_is_read_as_each_program_reads_it(text, pope, mme, lmms):
    assert ("yes" if is_yes(text) else "no") == pope
    assert parse_mme(text) == mme
    assert parse_mme_lmms(text) == lmms


def test_pope_takes_what_it_cannot_read_for_yes():
    assert (score_pope("maybe", "yes"), score_pope("maybe", "no"), score_pope("No.", "no")) == (1, 0, 1)


def test_a_truth_is_yes_or_no():
    assert is_true("Yes")
    assert not is_true("no\n")
    with pytest.raises(ValueError, match="'maybe'; expected yes or no"):
        is_true("maybe")


def test_counts_give_popes_figures():
    answers = ["Yes"] * 6 + ["No"] * 4
    truths = [True, True, True, True, False, False, True, False, False, False]
    counts = count_yes_no(answers, truths)
    assert counts == YesNoCounts(true_positives=4, false_positives=2, true_negatives=3, false_negatives=1)
    assert (counts.num_questions, counts.accuracy, counts.yes_ratio) == (10, 0.7, 0.6)
    assert counts.precision == pytest.approx(2 / 3)
    assert counts.recall == 0.8
    assert counts.f1 == pytest.approx(8 / 11)


@pytest.mark.parametrize(
    ("answers", "truths", "accuracy"), [([], [], 0), (["No"], [False], 1), (["No"], [True], 0), (["Yes"], [False], 0)]
)
def test_a_zero_denominator_gives_zero(answers, truths, accuracy):
    counts = count_yes_no(answers, truths)
    assert (counts.accuracy, counts.precision, counts.recall, counts.f1) == (accuracy, 0, 0, 0)


def test_another_number_of_truths_is_an_error():
    with pytest.raises(ValueError, match="2 answers, 1 truths"):
        count_yes_no(["Yes", "No"], [True])


def test_pope_is_the_mean_of_three_f1():
    """LLaVA issue 626 has the F1 of LLaVA-1.5 13B: 0.8718, 0.8629, 0.8450, mean 0.8599; its table reports 85.9.

    The answers behind them are not here, so this checks how parts are summed up and no published figure.
    """
    parts = [YesNoCounts(1, 0, 1, 0), YesNoCounts(1, 1, 0, 0), YesNoCounts(0, 1, 0, 1)]
    assert [part.f1 for part in parts] == [1, pytest.approx(2 / 3), 0]
    assert mean_f1(parts) == pytest.approx(5 / 9)
