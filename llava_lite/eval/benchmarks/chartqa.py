"""ChartQA: questions about charts, written by people and by a program, with a number or a word as the answer.

Masry et al. 2022, arXiv 2203.10244; a number may be off by 5%. The prompt is that of lmms-eval.
"""

from __future__ import annotations

from llava_lite.eval.benchmarks.base import Benchmark, Need, image_groups, percents, score_mean
from llava_lite.eval.benchmarks.files import has_tables, open_table, plain_rows, read_json, stored_image
from llava_lite.eval.questions import Question
from llava_lite.eval.scoring.numbers import score

ONE_WORD = "\nAnswer the question with a single word."
PARTS = ("human", "augmented")
REPOSITORY = "https://github.com/vis-nlp/ChartQA (ChartQA Dataset)"


class ChartQA(Benchmark):
    """ChartQA, from its own files or from a table of Hugging Face."""

    name = "chartqa"
    title = "ChartQA"
    directory = "chartqa"
    metric = "relaxed accuracy, %"
    source = "https://github.com/vis-nlp/ChartQA"
    splits = ("test", "val")
    max_new_tokens = 16
    takes_questions = False
    needs = tuple(Need(f"test/{name}", REPOSITORY) for name in ("test_human.json", "test_augmented.json", "png"))
    test_needs = (Need("val/val_human.json", REPOSITORY),)

    def load(self, directory, options):
        """Return the questions of people, then those of the program."""
        place = directory / options.split
        files = {part: place / f"{options.split}_{part}.json" for part in PARTS}
        if not all(file.is_file() for file in files.values()):
            if not has_tables(directory):
                needed = (*(file.name for file in files.values()), "png")
                missing = [Need(f"{options.split}/{name}", REPOSITORY) for name in needed]
                raise FileNotFoundError(self.missing_message(directory, missing))
            rows = open_table(directory, options.split, columns=("image",))
            return [from_row(i, row, stored_image(rows, i, "image")) for i, row in plain_rows(rows)]
        return [
            Question(
                f"{part}_{i}", item["query"] + ONE_WORD, (str(place / "png" / item["imgname"]),), part, item["label"]
            )
            for part, file in files.items()
            for i, item in enumerate(read_json(file))
        ]

    def score_one(self, question, answer):
        """Return the relaxed accuracy of an answer."""
        return score(answer, question.truth)

    def score(self, questions, answers, options):
        """Return the relaxed accuracy of all questions and of each part."""
        each = [self.score_one(*one) for one in zip(questions, answers, strict=True)]
        parts = percents(each, [question.category for question in questions])
        return score_mean(self.metric, each, parts, image_groups(questions))


def from_row(index, row, image) -> Question:
    """Return the question of a row: of lmms-lab's table, or of that of HuggingFaceM4."""
    if "query" in row:
        question, (truth, *_) = row["query"], as_list(row["label"])
        part = "augmented" if row["human_or_machine"] in (1, "machine") else "human"
    else:
        question, (truth, *_) = row["question"], as_list(row["answer"])
        part = row["type"].removesuffix("_test")
    return Question(index, question + ONE_WORD, (image,), part, truth)


def as_list(value) -> list:
    """Return a list of one for a single value."""
    return value if isinstance(value, list) else [value]
