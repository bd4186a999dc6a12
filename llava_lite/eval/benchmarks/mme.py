"""MME: two yes-or-no questions about an image, in ten tasks of perception and four of cognition (arXiv 2306.13394).

Fu et al. 2023. Papers that report one figure of LLaVA-1.5 mean perception.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from llava_lite.eval.benchmarks.base import Benchmark, Need, Scores
from llava_lite.eval.benchmarks.files import (
    open_table,
    plain_rows,
    read_questions,
    shared_images,
    write_text,
)
from llava_lite.eval.questions import SHORT_ANSWER, Question
from llava_lite.eval.scoring import mme
from llava_lite.eval.scoring.interval import bootstrap_interval

SITE = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
RELEASE = "MME_Benchmark_release_version"
QUESTIONS = "llava_mme.jsonl"
MME_ENDING = "Please answer yes or no."


class Truth(NamedTuple):
    """Name of the image without its ending, the question as MME writes it, and Yes or No."""

    image: str
    question: str
    answer: str


class Mme(Benchmark):
    """MME, as in LLaVA's playground/data/eval/MME."""

    name = "mme"
    title = "MME"
    directory = "MME"
    metric = "perception, of 2000"
    source = SITE
    needs = (Need(RELEASE, SITE),)

    def load(self, directory, options):
        """Return the questions, two of each image; the category is the task."""
        if self.has_tables_alone(directory, options):
            return check_pairs(self.from_table(directory), directory)
        self.check(directory)
        truths = {task: read_task(directory / RELEASE / task) for task in mme.TASKS}
        path = directory / (options.questions or QUESTIONS)
        if not path.is_file() and not options.questions:
            lacking = [Need(f"{RELEASE}/{task}", SITE) for task, found in truths.items() if not found]
            self.check(directory, lacking)
            return check_pairs(self.from_release(directory / RELEASE, truths), directory)
        questions = []
        for item, question in read_questions(path, directory / RELEASE):
            task, _, name = str(question.id).partition("/")
            key = (stem(name), bare(question.text))
            if key not in truths.get(task, {}):
                raise ValueError(
                    f"{path}: question {question.id!r}, {key[1]!r}, is not in {directory / RELEASE / task}. Get both "
                    f"of one release of MME ({SITE})."
                )
            image = find_image(directory / RELEASE, task, item["image"])
            questions.append(question._replace(images=(image,), category=task, truth=truths[task][key]))
        return check_pairs(questions, path)

    def from_release(self, release, truths):
        """Return the questions of MME's own files, as LLaVA asks them."""
        questions = []
        for task, found in truths.items():
            for (image, text), truth in found.items():
                file = next((path for path in candidates(release / task, image) if path.is_file()), None)
                if file is None:
                    raise FileNotFoundError(f"{release / task} has questions about {image!r}, but no image of it.")
                key = f"{task}/{file.name}"
                questions.append(Question(key, text + SHORT_ANSWER, (str(file),), task, truth))
        return questions

    def from_table(self, directory):
        """Return the questions of Hugging Face's table."""
        rows = open_table(directory, "test", columns=("question_id", "image", "question", "answer", "category"))
        image, questions = shared_images(rows, "image", "question_id"), []
        for index, row in plain_rows(rows):
            text, name = bare(row["question"]), row["question_id"].rpartition("/")[2]
            truth = Truth(stem(name), row["question"], row["answer"])
            images = (image(index, row),)
            questions.append(Question(row["question_id"], text + SHORT_ANSWER, images, row["category"], truth))
        return questions

    def score_one(self, question, answer):
        """Return whether the answer is right; neither yes nor no is wrong."""
        return mme.score(answer, question.truth.answer)

    def score(self, questions, answers, options):
        """Return perception, cognition and the score of each task; None for a sum whose tasks are not all there."""
        each = [self.score_one(*one) for one in zip(questions, answers, strict=True)]
        chosen, notes = complete_pairs(questions)
        tasks, images = [questions[i].category for i in chosen], [questions[i].truth.image for i in chosen]
        scores = [each[i] for i in chosen]
        found = mme.aggregate(tasks, images, scores)
        missing = [task for task in mme.TASKS if task not in found.tasks]
        if missing:
            notes += (f"Not asked: {', '.join(missing)}. A sum is given where all its tasks were asked.",)
        table = {} if found.cognition is None else {"cognition, of 800": found.cognition}
        for task, one in found.tasks.items():
            table |= {task: one.score, f"{task}: accuracy": 100 * one.acc, f"{task}: accuracy+": 100 * one.acc_plus}
        return Scores(
            self.metric, found.perception, perception_interval(found, tasks, images, scores), table, each, notes
        )

    def write(self, out, questions, answers, options):
        """Write the answers as the directory that MME's eval_tool/calculation.py reads: a file of each task."""
        lines = {}
        for question, answer in zip(questions, answers, strict=True):
            # A line is a question and TABs part its fields, so none may stand in an answer.
            fields = (f"{question.truth.image}.txt", *question.truth[1:], " ".join(answer.split()))
            lines.setdefault(question.category, []).append("\t".join(fields) + "\n")
        return [write_text(out / "eval_tool" / f"{task}.txt", "".join(found)) for task, found in lines.items()]


def stem(name: str) -> str:
    """Return the name of an image without directories and ending, as LLaVA's converter does."""
    return name.rpartition("/")[2].partition(".")[0]


def bare(text: str) -> str:
    """Return a question without LLaVA's ending and MME's."""
    return text.removesuffix(SHORT_ANSWER).strip().removesuffix(MME_ENDING).strip()


def read_task(directory) -> dict[tuple[str, str], Truth]:
    """Return {(image, bare question): Truth} of a task's text files, in their order; empty without the directory."""
    split = directory / "questions_answers_YN"
    found = {}
    for path in sorted((split if split.is_dir() else directory).glob("*.txt")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            fields = line.strip().split("\t")
            if fields == [""]:
                continue
            if len(fields) != 2 or fields[1].lower() not in ("yes", "no"):
                raise ValueError(f"{path}, line {number} is {line!r}; expected a question, a TAB, and Yes or No.")
            found[path.stem, bare(fields[0])] = Truth(path.stem, *fields)
    return found


def candidates(directory, image):
    """Yield the paths that an image of a task may have: beside the text files, or in images/."""
    for ending in ("jpg", "png", "jpeg"):
        yield from (directory / f"{image}.{ending}", directory / "images" / f"{image}.{ending}")


def find_image(release, task, image) -> str:
    """Return the path of an image of LLaVA's file, which may leave images/ out."""
    inside = release / task / "images" / image.rpartition("/")[2]
    return str(inside if not (release / image).is_file() and inside.is_file() else release / image)


def check_pairs(questions, source) -> list[Question]:
    """Return the questions; ValueError unless each image of a known task has two."""
    if not questions:
        raise ValueError(f"{source} has no questions of MME.")
    mme.group_pairs(*zip(*((one.category, one.truth.image, 0.0) for one in questions), strict=True))
    return questions


def complete_pairs(questions) -> tuple[list[int], tuple[str, ...]]:
    """Return the positions of the questions whose image has both, and a note if others were left out by --limit."""
    keys = [(one.category, one.truth.image) for one in questions]
    counts = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    chosen = [i for i, key in enumerate(keys) if counts[key] == mme.QUESTIONS_PER_IMAGE]
    left = len(keys) - len(chosen)
    return chosen, (f"{left} question without the other one of its image is left out.",) if left else ()


def perception_interval(found, tasks, images, scores):
    """Return the 95% interval of perception over draws of the images of each task; None without perception."""
    if found.perception is None:
        return None
    pairs = {key: value for key, value in mme.pair_scores(tasks, images, scores).items() if key[0] in mme.PERCEPTION}
    labels = [task for task, _ in pairs]
    # The sum of the tasks' means is the sum of all images, each by how many its task has.
    shares = np.array([value / labels.count(task) for (task, _), value in pairs.items()])
    return bootstrap_interval(len(shares), lambda chosen: shares[chosen].sum(), strata=labels)
