"""EvalAI's normalisation of answers and VQA's soft accuracy, against vectors that M4C's own program gave."""

import pytest

from llava_lite.eval.scoring.vqa_text import (
    CONTRACTED,
    CONTRACTIONS,
    process_answer,
    process_vqav2_answer,
    soft_accuracy,
)

# Output of m4c_evaluator.py of LLaVA, commit c121f04, which was run on them.
M4C = {
    "Yes.": "yes",
    "a, an, the": "",
    "two dogs": "2 dogs",
    "eleven": "eleven",
    "it's": "it 's",
    "its": "its",
    "dont": "don't",
    "Im here": "im here",
    "12,000": "12000",
    "1,2": "12",
    "3.": "3",
    "3.5": "3.5",
    "$3.50": "$3.50",
    "50%": "50%",
    "10 : 30": "10 : 30",
    "a-b": "b",
    "t-shirt": "t shirt",
    "black / white": "black white",
    "e.g. x": "eg x",
    "5.a": "5a",
    "L. A.": "l",
    "http://a.b": "http: ab",
    "(a)": "",
    "one-two": "1 2",
    "1,000-2": "1000 2",
    "no,1": "no1",
    "what's up?": "what 's up",
    "somebody'd": "somebodyd",
}


@pytest.mark.parametrize(("text", "expected"), M4C.items(), ids=repr)
def test_an_answer_is_normalised_as_m4c_does(text, expected):
    assert process_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        (" \n\t ", ""),
        ("?,?", ""),
        ("The\nDog", "dog"),
        ("a\tcat", "cat"),
        ("THE AN A", ""),
        ("None", "0"),
        ("zero one two three four five six seven eight nine ten", "0 1 2 3 4 5 6 7 8 9 10"),
        ("Café", "café"),
        ("猫。", "猫。"),
        ("a\u00a0cat", "cat"),
        ("...", ""),
        (".5", ".5"),
        ("hello!", "hello"),
        ("what! now", "what now"),
        ("a_b-c", "b c"),
        # The dash beside a space is deleted, and with it the one between letters.
        ("- t-shirt", "tshirt"),
        ("#1 & *2:3'4", "#1 & *2:3'4"),
        ("yall'd've", "y'all'd've"),
        ("lets", "lets"),
        ("The answer is two.", "answer is 2"),
    ],
)
def test_odd_answers_are_normalised_by_the_same_rules(text, expected):
    assert process_answer(text) == expected


def test_at_most_32_points_are_deleted():
    """The flag re.UNICODE, which is 32, stands where M4C's substitution takes the largest number of replacements."""
    assert process_answer("." * 40) == "." * 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12,000", "12000"),
        # With a comma in a number every mark is deleted, none becomes a space.
        ("1,000-2", "10002"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("it's", "it's"),
        ("what's up?", "what's up"),
        ("Yes?", "yes"),
        ("no,1", "no 1"),
        ("Two\tDogs\n", "2 dogs"),
    ],
)
def test_vqav2_leaves_the_first_step_out(text, expected):
    assert process_vqav2_answer(text) == expected


def test_contractions_lack_one_apostrophe_each():
    assert len(CONTRACTED.split()) == 95
    assert len(CONTRACTIONS) == 120
    assert CONTRACTIONS["aint"] == "ain't"
    assert [key for key, word in CONTRACTIONS.items() if word == "y'all'd've"] == [
        "yall'd've",
        "y'alld've",
        "y'all'dve",
    ]
    assert [key for key, word in CONTRACTIONS.items() if word == "'ow's'at"] == ["ow's'at", "'ows'at", "'ow'sat"]
    assert (CONTRACTIONS["let's"], CONTRACTIONS["she's"], CONTRACTIONS["somebody'd"]) == (
        "let's",
        "she's",
        "somebodyd",
    )


@pytest.mark.parametrize(
    ("num_equal", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (5, 1.0), (9, 1.0), (10, 1.0)]
)
def test_soft_accuracy_counts_those_who_agree(num_equal, expected):
    assert soft_accuracy("dog", ["dog"] * num_equal + ["cat"] * (10 - num_equal)) == expected


def test_soft_accuracy_is_the_mean_of_the_sets_without_one_person():
    answers = ["red"] * 3 + ["blue"] * 2 + ["green"] * 5
    for word in ("red", "blue", "green"):
        sets = [answers[:i] + answers[i + 1 :] for i in range(10)]
        assert soft_accuracy(word, answers) == pytest.approx(sum(min(1, one.count(word) / 3) for one in sets) / 10)


def test_both_sides_are_normalised():
    assert soft_accuracy("The 2 dogs.", ["two dogs"] * 10) == 1
    assert soft_accuracy("2 dogs", ["Two dogs", "a 2 dogs?"] + ["cats"] * 8) == 0.6
    assert soft_accuracy("", ["the"] * 10) == 1


def test_the_normalisation_can_be_chosen():
    answers = ["red,blue"] * 10
    assert soft_accuracy("red blue", answers) == 0
    assert soft_accuracy("red blue", answers, process_vqav2_answer) == 1


@pytest.mark.parametrize(
    ("answers", "found"),
    [(["dog"] * 9, "9 answers"), ([], "0 answers"), (["x"] * 11, "11"), ("dogdogdogd", "the text")],
)
def test_another_number_of_answers_is_an_error(answers, found):
    with pytest.raises(ValueError, match=f"10 people; got {found}"):
        soft_accuracy("dog", answers)
