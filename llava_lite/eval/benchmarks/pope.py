"""POPE: is an object in the image? Yes or no, of objects that are and objects that are not (arXiv 2305.10355).

Li et al. 2023. Its three parts take the absent objects at random, from the most frequent ones, and from those that
stand beside the present ones.
"""

from __future__ import annotations

import numpy as np

from llava_lite.eval.benchmarks.base import Benchmark, Need, Scores, image_groups
from llava_lite.eval.benchmarks.files import (
    check_no_repeats,
    open_table,
    plain_rows,
    read_lines,
    read_questions,
    shared_images,
)
from llava_lite.eval.questions import SHORT_ANSWER, Question
from llava_lite.eval.scoring.interval import bootstrap_interval
from llava_lite.eval.scoring.yes_no import count_yes_no, is_true, is_yes, mean_f1, score_pope

PARTS = ("random", "popular", "adversarial")
LABELS = "https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"


class Pope(Benchmark):
    """POPE on COCO, as in LLaVA's playground/data/eval/pope."""

    name = "pope"
    title = "POPE"
    directory = "pope"
    metric = "F1, mean of the three parts, %"
    source = "https://github.com/AoiDragon/POPE"
    needs = (
        *(Need(f"coco/coco_pope_{part}.json", LABELS) for part in PARTS),
        Need("val2014", "http://images.cocodataset.org/zips/val2014.zip"),
    )

    def load(self, directory, options):
        """Return the questions of the three parts, each with yes or no as its truth."""
        if self.has_tables_alone(directory, options):
            return self.from_table(directory)
        self.check(directory)
        labels = {part: read_labels(directory / f"coco/coco_pope_{part}.json") for part in PARTS}
        file = directory / (options.questions or "llava_pope_test.jsonl")
        if not file.is_file() and options.questions is None:
            return [
                Question(
                    item["question_id"],
                    item["text"] + SHORT_ANSWER,
                    (str(directory / "val2014" / item["image"]),),
                    part,
                    item["label"],
                )
                for part in PARTS
                for item in labels[part].values()
            ]
        questions, keys = [], []
        for item, question in read_questions(file, directory / "val2014"):
            part, text = question.category, question.text.removesuffix(SHORT_ANSWER)
            found = labels.get(part, {}).get((item.get("image"), text))
            if found is None:
                raise ValueError(
                    f"{file}: question {question.id!r}, {text!r} about {item.get('image')}, has no label in "
                    f"coco/coco_pope_{part}.json. Both files must be of one release of POPE."
                )
            questions.append(question._replace(truth=found["label"]))
            keys.append((part, item["image"], text))
        check_no_repeats(keys, file)
        return questions

    def from_table(self, directory):
        """Return the questions of Hugging Face's table."""
        columns = ("question_id", "question", "answer", "category", "image")
        rows = open_table(directory, "test", columns=columns)
        image = shared_images(rows, "image", "image_source")
        return [
            Question(
                row["question_id"],
                row["question"] + SHORT_ANSWER,
                (image(index, row),),
                row["category"],
                row["answer"],
            )
            for index, row in plain_rows(rows)
        ]

    def score_one(self, question, answer):
        """Return whether the answer is right."""
        return score_pope(answer, question.truth)

    def score(self, questions, answers, options):
        """Return the mean F1 of the parts, and the figures of each; an answer without a no is a yes, as in LLaVA."""
        labels = np.array([question.category for question in questions])
        parts = {part: np.flatnonzero(labels == part) for part in PARTS if part in labels}
        unknown = sorted(set(labels) - set(PARTS))
        if unknown:
            raise ValueError(f"POPE has no part {', '.join(unknown)}; known: {', '.join(PARTS)}.")
        truths = [is_true(question.truth) for question in questions]
        table, counts = {}, []
        for part, chosen in parts.items():
            found = count_yes_no([answers[i] for i in chosen], [truths[i] for i in chosen])
            counts.append(found)
            table |= {f"{part}: questions": found.num_questions, f"{part}: F1": 100 * found.f1}
            table |= {f"{part}: accuracy": 100 * found.accuracy, f"{part}: precision": 100 * found.precision}
            table |= {f"{part}: recall": 100 * found.recall, f"{part}: yes": 100 * found.yes_ratio}
        says, holds = np.array([is_yes(answer) for answer in answers]), np.array(truths)

        def figure(chosen):
            return 100 * np.mean([f1(says[mine], holds[mine]) for mine in split(chosen)])

        def split(chosen):
            return [chosen[labels[chosen] == part] for part in parts]

        return Scores(
            self.metric,
            100 * mean_f1(counts),
            bootstrap_interval(len(questions), figure, groups=image_groups(questions), strata=labels.tolist()),
            table,
            [self.score_one(*one) for one in zip(questions, answers, strict=True)],
            () if len(parts) == len(PARTS) else (f"Only the part {', '.join(parts)} was asked.",),
        )


def read_labels(path) -> dict[tuple[str, str], dict]:
    """Return {(image, text): line} of a part's file."""
    found = {}
    for item in read_lines(path, ("question_id", "image", "text", "label")):
        if item["label"] not in ("yes", "no"):
            raise ValueError(
                f"{path}: question {item['question_id']!r} has the label {item['label']!r}; expected yes or no."
            )
        key = item["image"], item["text"]
        if key in found and found[key]["label"] != item["label"]:
            raise ValueError(f"{path}: {key[1]!r} about {key[0]} has both labels, yes and no.")
        found[key] = item
    return found


def f1(says, holds) -> float:
    """Return the F1 of answers that say yes where it holds or not; 0 where none is a yes. Both [questions], bool."""
    both = 2 * np.sum(says & holds)
    return both / max(1, np.sum(says) + np.sum(holds))
