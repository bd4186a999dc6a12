"""GQA's exact match, and its means over kinds of questions."""

import pytest

from llava_lite.eval.scoring.gqa import aggregate, normalize, score


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("yes", True),
        ("Yes.", True),
        ("YES...", True),
        ("yes ", False),
        ("yes!", False),
        ("yes. ", False),
        ("the yes", False),
        ("", False),
        ("yes\n", False),
        ("yes, it is", False),
    ],
)
def test_the_bare_word_is_right(answer, right):
    assert score(answer, "yes") == float(right)


def test_only_points_at_the_end_are_removed():
    assert normalize(".A.B..") == ".a.b"


def test_a_query_is_an_open_question():
    table = aggregate(
        [1, 0, 1, 1],
        ["query", "query", "verify", "choose"],
        ["rel", "attr", "rel", "obj"],
    )
    assert table == {
        "accuracy": 0.75,
        "open": 0.5,
        "binary": 1,
        "structural": {"query": 0.5, "verify": 1, "choose": 1},
        "semantic": {"rel": 1, "attr": 0, "obj": 1},
    }


def test_types_may_be_unknown():
    assert aggregate([1, 0]) == {"accuracy": 0.5}
    assert aggregate([1], ["verify"]) == {"accuracy": 1, "binary": 1, "structural": {"verify": 1}}


def test_lists_of_unequal_lengths_and_no_scores_are_errors():
    with pytest.raises(ValueError, match="2 scores, 1 kinds"):
        aggregate([1, 0], ["query"])
    with pytest.raises(ValueError, match="0 scores"):
        aggregate([])
