"""Turn answers to MME into its scores: two questions about each image, and credit for both together.

MME (Fu et al. 2023, arXiv 2306.13394, section 2.2). A task scores 100 * (acc + acc+), 200 at most: acc is the fraction
of right answers, acc+ that of images with both answers right. LLaVA reports the sum over the ten perception tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from llava_lite.eval.scoring.means import check_lengths, group_by
from llava_lite.eval.scoring.yes_no import is_true, parse_mme

# Tasks and how many questions each has; the sums of their scores are 2000 and 800 at most.
PERCEPTION = {"existence": 60, "count": 60, "position": 60, "color": 60, "posters": 294}
PERCEPTION |= {"celebrity": 340, "scene": 400, "landmark": 400, "artwork": 400, "OCR": 40}
COGNITION = {"commonsense_reasoning": 140, "numerical_calculation": 40, "text_translation": 40, "code_reasoning": 40}
TASKS = PERCEPTION | COGNITION
QUESTIONS_PER_IMAGE = 2


class TaskScore(NamedTuple):
    """The result of a task: acc and acc_plus, 0 to 1."""

    num_questions: int
    acc: float
    acc_plus: float

    @property
    def score(self) -> float:
        """Return the score of the task, 0 to 200."""
        return 100 * (self.acc + self.acc_plus)


class MmeScores(NamedTuple):
    """The result of MME; perception (0 to 2000) and cognition (0 to 800) are None unless all their tasks are there."""

    tasks: dict[str, TaskScore]
    perception: float | None
    cognition: float | None


def score(prediction: str, truth: str) -> float:
    """Return 1 if an answer is right, else 0; an answer that is neither yes nor no is wrong. truth: yes or no."""
    return float(parse_mme(prediction) == ("yes" if is_true(truth) else "no"))


def pair_scores(tasks: Sequence[str], images: Sequence[str], scores: Sequence[float]) -> dict[tuple[str, str], float]:
    """Return {(task, image): 100 * (acc + acc+) of its two questions}: 0, 50 or 200, in the order of the images.

    The mean over a task's images is the score of the task. Raises ValueError for an image that has not exactly two
    questions, and for an unknown task.
    """
    return {
        pair: 100 * (fmean(two) + float(min(two) == 1)) for pair, two in group_pairs(tasks, images, scores).items()
    }


def aggregate(tasks: Sequence[str], images: Sequence[str], scores: Sequence[float]) -> MmeScores:
    """Return the scores of each task and their sums. tasks, images: of each question; errors as in `pair_scores`."""
    pairs = group_pairs(tasks, images, scores)
    by_task = group_by(list(pairs.values()), [task for task, _ in pairs])
    found = {
        task: TaskScore(
            num_questions=QUESTIONS_PER_IMAGE * len(by_task[task]),
            acc=fmean(fmean(two) for two in by_task[task]),
            acc_plus=fmean(min(two) == 1 for two in by_task[task]),
        )
        for task in TASKS
        if task in by_task
    }
    return MmeScores(found, sum_tasks(found, PERCEPTION), sum_tasks(found, COGNITION))


def group_pairs(tasks, images, scores) -> dict[tuple[str, str], list[float]]:
    """Return {(task, image): its two scores}; errors as in `pair_scores`."""
    check_lengths(tasks=tasks, images=images, scores=scores)
    unknown = sorted(set(tasks) - TASKS.keys())
    if unknown:
        raise ValueError(f"MME has no task {', '.join(unknown)}; known: {', '.join(TASKS)}.")
    pairs = group_by(scores, list(zip(tasks, images, strict=True)))
    odd = {pair: len(found) for pair, found in pairs.items() if len(found) != QUESTIONS_PER_IMAGE}
    if odd:
        (task, image), count = next(iter(odd.items()))
        others = f" So have {len(odd) - 1:,} other images." if len(odd) > 1 else ""
        raise ValueError(
            f"image {image!r} of the task {task} has answers to {count} question{'s' if count > 1 else ''}; MME "
            f"scores two for each image.{others} Answer both questions of an image, or leave it out."
        )
    return pairs


def sum_tasks(found: dict[str, TaskScore], tasks: dict[str, int]) -> float | None:
    """Return the sum of the scores of some tasks, None unless all are there."""
    return sum(found[task].score for task in tasks) if found.keys() >= tasks.keys() else None


def differing_sizes(found: dict[str, TaskScore]) -> dict[str, tuple[int, int]]:
    """Return {task: (questions found, questions of MME)} of the tasks that are not complete; empty for all of MME."""
    sizes = {task: found[task].num_questions if task in found else 0 for task in TASKS}
    return {task: (sizes[task], expected) for task, expected in TASKS.items() if sizes[task] != expected}
