"""MME's scores of tasks and their sums."""

import pytest

from llava_lite.eval.scoring.mme import (
    COGNITION,
    PERCEPTION,
    TASKS,
    aggregate,
    differing_sizes,
    pair_scores,
    score,
)

# Scores that the tool of MME gave for the answers of LaVIN, which come with it.
LAVIN = dict(zip(PERCEPTION, [185.0, 88.33, 63.33, 75.0, 79.59, 47.35, 136.75, 93.5, 87.25, 107.5], strict=True))
LAVIN |= dict(zip(COGNITION, [87.14, 65.0, 47.5, 50.0], strict=True))


def make_answers(counts):
    """Return tasks, images and scores of {task: (images with both right, with one right, with none right)}."""
    rows = []
    for task, numbers in counts.items():
        pairs = [pair for pair, number in zip([(1, 1), (0, 1), (0, 0)], numbers, strict=True) for _ in range(number)]
        rows += [(task, f"{i:04}.png", one) for i, pair in enumerate(pairs) for one in pair]
    return map(list, zip(*rows, strict=True))


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [("Yes", "Yes", 1), ("no", "No", 1), ("NO.", "no", 1), ("Yes", "No", 0), ("It is", "Yes", 0), ("", "No", 0)],
)
def test_an_answer_that_is_neither_is_wrong(answer, truth, expected):
    assert score(answer, truth) == expected


def test_a_pair_gives_0_50_or_200():
    pairs = pair_scores(["OCR"] * 6, ["a", "a", "b", "b", "c", "c"], [1, 1, 0, 1, 0, 0])
    assert pairs == {("OCR", "a"): 200, ("OCR", "b"): 50, ("OCR", "c"): 0}


def test_a_task_adds_the_fractions_of_questions_and_of_images():
    tasks, images, scores = make_answers({"count": (1, 2, 1)})
    found = aggregate(tasks, images, scores)
    assert found.tasks["count"] == (8, 0.5, 0.25)
    assert found.tasks["count"].score == 75
    assert found.perception is None
    assert found.cognition is None


def test_the_two_questions_need_not_stand_together():
    found = aggregate(["OCR", "count", "count", "OCR"], ["a", "a", "a", "a"], [1, 0, 1, 1])
    assert (found.tasks["OCR"].score, found.tasks["count"].score) == (200, 50)


def test_all_right_gives_2000_and_800():
    tasks, images, scores = make_answers({task: (size // 2, 0, 0) for task, size in TASKS.items()})
    found = aggregate(tasks, images, scores)
    assert (len(scores), found.perception, found.cognition) == (2374, 2000, 800)
    assert differing_sizes(found.tasks) == {}


def test_sums_are_those_of_lavin():
    """LaVIN under the tool of MME: perception 963.611, cognition 249.643.

    Its answers are not here. So each task gets as many right answers as make its published score, in the right number
    of questions, and the sums are checked; how the tool reads LaVIN's words is not.
    """
    counts = {}
    for task, size in TASKS.items():
        # An image with both right is worth four times one with one right.
        both, one = divmod(round(LAVIN[task] * size / 100), 4)
        counts[task] = (both, one, size // 2 - both - one)
    found = aggregate(*make_answers(counts))
    assert {task: round(result.score, 2) for task, result in found.tasks.items()} == LAVIN
    assert (round(found.perception, 3), round(found.cognition, 3)) == (963.611, 249.643)


def test_a_sum_needs_all_its_tasks():
    tasks, images, scores = make_answers(dict.fromkeys(TASKS.keys() - {"existence"}, (1, 0, 0)))
    found = aggregate(tasks, images, scores)
    assert (found.perception, found.cognition) == (None, 800)
    assert differing_sizes(found.tasks)["existence"] == (0, 60)
    assert differing_sizes(found.tasks)["OCR"] == (2, 40)


@pytest.mark.parametrize(("images", "count"), [(["a", "a", "b"], "1 question;"), (["b", "b", "b"], "3 questions;")])
def test_an_image_without_two_questions_is_an_error(images, count):
    with pytest.raises(ValueError, match=f"image 'b' of the task OCR has answers to {count}"):
        aggregate(["OCR"] * 3, images, [1, 1, 1])


def test_all_images_without_two_questions_are_counted():
    with pytest.raises(ValueError, match=r"image 'a' .* So have 2 other images"):
        aggregate(["OCR"] * 3, ["a", "b", "c"], [1, 1, 1])


def test_unknown_tasks_and_unequal_lists_are_errors():
    with pytest.raises(ValueError, match="MME has no task ocr; known: existence"):
        aggregate(["ocr", "ocr"], ["a", "a"], [1, 1])
    with pytest.raises(ValueError, match="2 tasks, 2 images, 1 scores"):
        aggregate(["OCR", "OCR"], ["a", "a"], [1])
