"""VizWiz: questions of blind people about photos that they took; some cannot be answered (arXiv 1802.08218).

Gurari et al. 2018. Papers report test, which EvalAI's server scores; val is scored here.
"""

from __future__ import annotations

from typing import NamedTuple

from llava_lite.eval.benchmarks.base import EVAL_ZIP, Benchmark, Need, Scores, percents, score_mean
from llava_lite.eval.benchmarks.files import (
    look_up,
    open_table,
    plain_rows,
    read_json,
    read_questions,
    stored_image,
    write_json,
)
from llava_lite.eval.questions import SHORT_ANSWER, Question
from llava_lite.eval.scoring.vqa_text import process_answer, soft_accuracy

SERVER = "https://eval.ai/web/challenges/challenge-page/2185"
ANNOTATIONS = "https://vizwiz.cs.colorado.edu/VizWiz_final/vqa_data/Annotations.zip"
IMAGES = "https://vizwiz.cs.colorado.edu/VizWiz_final/images"
QUESTIONS = "llava_test.jsonl"
ENDING = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT_ANSWER


class Truth(NamedTuple):
    """The name of a question's image, which is its key in the upload; in val, ten answers and their type."""

    image: str
    answers: list[str] | None = None
    answer_type: str = "other"


class VizWiz(Benchmark):
    """VizWiz VQA, as in LLaVA's playground/data/eval/vizwiz."""

    name = "vizwiz"
    title = "VizWiz"
    directory = "vizwiz"
    metric = "soft accuracy, %"
    source = "https://vizwiz.org/tasks-and-datasets/vqa"
    splits = ("val", "test")
    needs = (Need("val.json", ANNOTATIONS), Need("val", f"{IMAGES}/val.zip"))
    test_needs = (Need(QUESTIONS, EVAL_ZIP), Need("test", f"{IMAGES}/test.zip"))

    def load(self, directory, options):
        """Return the questions, each with its Truth."""
        needs = self.needs if options.split == "val" else self.test_needs
        if self.has_tables_alone(directory, options, needs):
            return self.from_table(directory, options)
        self.check(directory, needs[1:] if options.questions and options.split == "test" else needs)
        images = directory / options.split
        if options.split == "test":
            lines = read_questions(directory / (options.questions or QUESTIONS), images)
            return [question._replace(truth=Truth(item["image"])) for item, question in lines]
        items = read_json(directory / "val.json")
        truths = {item["image"]: to_truth(item) for item in items}
        if options.questions:
            path = directory / options.questions
            return [
                question._replace(truth=look_up(truths, item.get("image"), path, directory / "val.json"))
                for item, question in read_questions(path, images)
            ]
        return [
            Question(number, item["question"] + ENDING, (str(images / item["image"]),), truth=truths[item["image"]])
            for number, item in enumerate(items)
        ]

    def from_table(self, directory, options):
        """Return the questions of Hugging Face's table, whose ids are names of images without .jpg."""
        rows = open_table(directory, options.split, columns=("image", "question_id", "question"))
        questions = []
        for index, row in plain_rows(rows):
            image = f"{row['question_id'].removesuffix('.jpg')}.jpg"
            answers = row.get("answers") if options.split == "val" else None
            text = row["question"] + ENDING
            truth = Truth(image, answers, row.get("category") or "other")
            questions.append(Question(row["question_id"], text, (stored_image(rows, index, "image"),), truth=truth))
        return questions

    def score_one(self, question, answer):
        """Return the soft accuracy of an answer; None in test."""
        return None if question.truth.answers is None else soft_accuracy(answer, question.truth.answers)

    def score(self, questions, answers, options):
        """Return the mean soft accuracy of val, and of each type of answer."""
        if options.split == "test":
            return Scores(self.metric, None, notes=(f"Upload the file to {SERVER}, which scores it.",))
        each = [self.score_one(*one) for one in zip(questions, answers, strict=True)]
        table = percents(each, [question.truth.answer_type for question in questions])
        return score_mean(self.metric, each, table, notes=("This is val; the figures of papers are test.",))

    def write(self, out, questions, answers, options):
        """Write the upload of test, in the order of the questions."""
        if options.split == "val":
            return []
        pairs = zip(questions, answers, strict=True)
        upload = [{"image": question.truth.image, "answer": process_answer(answer)} for question, answer in pairs]
        return [write_json(out / "vizwiz_test_upload.json", upload)]


def to_truth(item) -> Truth:
    """Return the truth of an entry of val.json."""
    return Truth(item["image"], [answer["answer"] for answer in item["answers"]], item.get("answer_type", "other"))
