"""ScienceQA: multiple choice of school books, about half of it with an image (arXiv 2209.09513).

Lu et al. 2022. Papers that report one figure of LLaVA mean the questions with an image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from llava_lite.eval.benchmarks.base import EVAL_ZIP, Benchmark, Need, Scores, percents, score_mean
from llava_lite.eval.benchmarks.files import (
    check_asked,
    check_same,
    look_up,
    open_table,
    plain_rows,
    read_json,
    stored_image,
    write_json,
)
from llava_lite.eval.questions import OPTION_LETTER, Question
from llava_lite.eval.scoring.letters import LETTERS, parse_scienceqa, score_scienceqa
from llava_lite.eval.scoring.means import mean

SITE = "https://github.com/lupantech/ScienceQA, data/scienceqa"
QUESTIONS = "llava_test_CQM-A.json"


class Truth(NamedTuple):
    """The index of the right choice, and how many there are."""

    answer: int
    num_choices: int


class ScienceQa(Benchmark):
    """The test part of ScienceQA, as in LLaVA's playground/data/eval/scienceqa."""

    name = "sqa"
    title = "ScienceQA"
    directory = "scienceqa"
    metric = "accuracy of the questions with an image, %"
    source = SITE
    max_new_tokens = 1024
    needs = (
        Need(QUESTIONS, EVAL_ZIP),
        Need("problems.json", SITE),
        Need("pid_splits.json", SITE),
        Need("images/test", f"{SITE}, test.zip"),
    )

    def load(self, directory, options):
        """Return the questions of test, each with its Truth."""
        if self.has_tables_alone(directory, options):
            return self.from_table(directory)
        self.check(directory, self.needs[1:] if options.questions else self.needs)
        path, splits = directory / (options.questions or QUESTIONS), directory / "pid_splits.json"
        ids, problems = read_json(splits)["test"], read_json(directory / "problems.json")
        truths = {str(key): look_up(problems, str(key), splits, directory / "problems.json") for key in ids}
        questions = []
        for item in read_json(path):
            problem = look_up(truths, str(item["id"]), path, splits)
            text = item["conversations"][0]["value"].replace("<image>", "").strip() + OPTION_LETTER
            image = item.get("image")
            images = () if image is None else (str(directory / "images/test" / image),)
            question = to_question(item["id"], text, images, problem)
            parts = [problem["question"], to_options(problem)]
            questions.append(check_same(question, parts, path, directory / "problems.json"))
        if not options.questions:
            check_asked([str(question.id) for question in questions], truths, path, splits)
        return questions

    def from_table(self, directory):
        """Return the questions of Hugging Face's table, in the form of LLaVA's file: FULL, or IMG alone."""
        config = "ScienceQA-FULL" if (directory / "ScienceQA-FULL").is_dir() else None
        rows = open_table(directory, "test", config, ("image", "question", "choices", "answer", "hint"))
        has_image = rows.data.column("image").is_valid().to_pylist()
        questions = []
        for index, row in plain_rows(rows):
            images = (stored_image(rows, index, "image"),) if has_image[index] else ()
            questions.append(to_question(row.get("id", index), to_text(row) + OPTION_LETTER, images, row))
        return questions

    def score_one(self, question, answer):
        """Return whether the answer names the right choice."""
        return score_scienceqa(answer, *question.truth)

    def score(self, questions, answers, options):
        """Return the accuracy of the questions with an image, of all, and of those of text alone."""
        each = [self.score_one(*one) for one in zip(questions, answers, strict=True)]
        kinds = ["with image" if question.images else "text alone" for question in questions]
        table = {"all": 100 * mean(each), **percents(each, kinds)}
        with_image = [one for one, kind in zip(each, kinds, strict=True) if kind == "with image"]
        if not with_image:
            return Scores(self.metric, None, None, table, each, ("No question that was asked has an image.",))
        return replace(score_mean(self.metric, with_image, table), each=each)

    def write(self, out, questions, answers, options):
        """Write what LLaVA's program writes by --output-result: the index of each choice, -1 for none."""
        pairs = list(zip(questions, answers, strict=True))
        results = {str(one.id): parse_scienceqa(answer, one.truth.num_choices) for one, answer in pairs}
        correct = sum(results[str(one.id)] == one.truth.answer for one in questions)
        found = {"acc": 100 * correct / len(pairs), "correct": correct, "count": len(pairs), "results": results}
        found["outputs"] = {str(one.id): answer for one, answer in pairs}
        return [write_json(out / "scienceqa_results.json", found)]


def to_question(key, text, images, problem) -> Question:
    """Return a question; in the answer file its prompt holds `<image>` where it has one, as in LLaVA."""
    saved = f"<image>\n{text}" if images else text
    truth = Truth(problem["answer"], len(problem["choices"]))
    return Question(key, text, images, problem.get("subject", "default"), truth, saved)


def to_text(problem) -> str:
    """Return a question as LLaVA's convert_sqa_to_llava.py writes it: context, question, options."""
    context = problem["hint"].strip() or "N/A"
    text = f"Context: {context}\nQuestion: {problem['question']}\nOptions: {to_options(problem)}"
    return text.replace("  ", " ").strip()


def to_options(problem) -> str:
    """Return the choices of a question, each with its letter."""
    return " ".join(f"({letter}) {text}" for letter, text in zip(LETTERS, problem["choices"], strict=False))
