"""MMBench's circular score."""

import pytest

from llava_lite.eval.scoring.mmbench import aggregate, circular_scores, get_group


def test_a_question_counts_if_all_its_rotations_are_right():
    indices = [7, 1_000_007, 2_000_007, 8, 1_000_008, 9]
    assert circular_scores(indices, [1, 1, 1, 1, 0, 1]) == {7: 1, 8: 0, 9: 1}


def test_rotations_may_stand_in_any_order():
    assert circular_scores([1_000_007, 3, 7], [1, 0, 1]) == {7: 1, 3: 0}


def test_the_group_is_the_index_without_its_millions():
    assert (get_group(7), get_group(3_000_241), get_group(999_999)) == (7, 241, 999_999)


def test_categories_are_those_of_base_lines():
    table = aggregate(
        [1, 1_000_001, 2, 1_000_002, 3],
        [1, 1, 1, 0, 0],
        ["ocr", "ocr", "ocr", "ocr", "scene"],
        ["fine", "fine", "coarse", "coarse", "coarse"],
    )
    assert table == {
        "overall": pytest.approx(1 / 3),
        "vanilla": pytest.approx(2 / 3),
        "category": {"ocr": 0.5, "scene": 0},
        "l2-category": {"fine": 1, "coarse": 0},
    }


@pytest.mark.parametrize(
    ("indices", "missing"),
    [([7, 2_000_007], "index 1000007"), ([1_000_007, 2_000_007], "index 7"), ([3_000_007], "7")],
)
def test_a_missing_rotation_is_an_error(indices, missing):
    with pytest.raises(
        ValueError, match=f"question 7 has answers to {len(indices)} rotations, and none to .*{missing}"
    ):
        circular_scores(indices, [1] * len(indices))


def test_a_line_that_stands_twice_and_unequal_lists_are_errors():
    with pytest.raises(ValueError, match="index 7 stands twice"):
        circular_scores([7, 1_000_007, 7], [1, 1, 1])
    with pytest.raises(ValueError, match="1 indices, 2 scores"):
        circular_scores([7], [1, 1])
