"""easy-VQA: yes-or-no, colour and shape questions about drawn shapes of 64 pixels (PyPI easy-vqa, Zhou 2019).

Small enough for a first run: the package of 3 MB holds images and questions. No paper reports a figure.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from llava_lite.eval.benchmarks.base import Benchmark, Need, image_groups, percents, score_mean
from llava_lite.eval.benchmarks.files import read_json
from llava_lite.eval.questions import SHORT_ANSWER, Question

PACKAGE = "its package: pip install easy-vqa"
FILES = ("questions.json", "images")
SHAPES = {"circle", "rectangle", "triangle"}
YES_NO = {"yes", "no"}


class EasyVqa(Benchmark):
    """easy-VQA: --data, or the installed package."""

    name = "easy_vqa"
    title = "easy-VQA"
    directory = "easy_vqa"
    source = "https://github.com/vzhou842/easy-VQA"
    splits = ("test", "train")
    takes_questions = False
    needs = tuple(Need(f"test/{name}", PACKAGE) for name in FILES)

    def load(self, directory, options):
        """Return the questions of [question, answer, number of its image]."""
        needs = [Need(f"{options.split}/{name}", PACKAGE) for name in FILES]
        # A directory that is named and has other files is a mistake, and not a wish for the package's data.
        places = [directory, *([] if directory.is_dir() and any(directory.iterdir()) else installed())]
        root = next((place for place in places if (place / needs[0].path).is_file()), directory)
        self.check(root, needs)
        questions = []
        for number, item in enumerate(read_json(root / needs[0].path)):
            if not (isinstance(item, list) and len(item) == 3):
                raise ValueError(
                    f"{root / needs[0].path}: question {number} is {item!r}; expected [question, answer, image]."
                )
            text, answer, image = item
            path = root / needs[1].path / f"{image}.png"
            questions.append(Question(number, text + SHORT_ANSWER, (str(path),), kind_of(answer), answer))
        return questions

    def score_one(self, question, answer):
        """Return whether the answer is the word, in any case, with a point or without."""
        return float(answer.strip().lower().replace(".", "") == question.truth)

    def score(self, questions, answers, options):
        """Return the accuracy, and that of each kind of question."""
        each = [self.score_one(*one) for one in zip(questions, answers, strict=True)]
        table = percents(each, [question.category for question in questions])
        return score_mean(self.metric, each, table, image_groups(questions))


def kind_of(answer: str) -> str:
    """Return the kind of a question by its answer."""
    return "yes or no" if answer in YES_NO else "shape" if answer in SHAPES else "colour"


def installed() -> list[Path]:
    """Return the data directory of the installed package, in a list that is empty without it."""
    found = importlib.util.find_spec("easy_vqa")
    return [Path(place) / "data" for place in (found.submodule_search_locations if found else ())]
