"""MMMU: questions of university exams in 30 subjects, most with choices, about figures, tables and photos.

Yue et al. 2024, arXiv 2311.16502, validation split. Asked as MMMU's own code asks LLaVA-1.5: of the images the first
one, prepared without padding. That code samples; so does the variant `flagperf`, since FlagPerf runs the same code.
The default is greedy decoding, which gives the same answers again and other ones than sampling.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import NamedTuple

from llava_lite.eval.benchmarks.base import Benchmark, Need, score_mean
from llava_lite.eval.benchmarks.files import has_tables, open_table, plain_rows, read_json, stored_image, write_json
from llava_lite.eval.questions import OPTION_LETTER, SHORT_ANSWER, Question
from llava_lite.eval.scoring.mmmu import (
    SUBJECTS,
    Draws,
    aggregate,
    parse_choice,
    parse_open,
    score,
    score_choice,
    score_open,
)

SOURCE = "https://huggingface.co/datasets/MMMU/MMMU"
# Truths of the official program; where the file is missing, those of the tables are taken, which are the same.
TRUTHS = "answer_dict_val.json"
COLUMNS = ("id", "question", "options", "answer", "question_type", "image_1")
# Beams of sampled tokens; top_k is what transformers 4 takes by default, top_p is off.
SAMPLING = {"temperature": 1.0, "num_beams": 5, "seed": 42, "more": {"top_k": 50, "top_p": 1.0}}


class Truth(NamedTuple):
    """What is right: a letter with {letter: option}, or one text or several with None."""

    answer: str | Sequence[str]
    options: dict[str, str] | None


class MMMU(Benchmark):
    """MMMU, from a clone of its repository on Hugging Face."""

    name = "mmmu"
    title = "MMMU"
    directory = "MMMU"
    source = SOURCE
    splits = ("validation",)
    variants = ("greedy", "flagperf")
    takes_questions = False
    needs = (Need("Accounting/validation-00000-of-00001.parquet", f"{SOURCE}, and so for every subject"),)

    def load(self, directory, options):
        """Return the questions of all subjects, in the order of their names."""
        if not has_tables(directory):
            self.check(directory)
        truths = read_json(directory / TRUTHS) if (directory / TRUTHS).is_file() else {}
        questions = []
        for subject in sorted(SUBJECTS):
            rows = open_table(directory, options.split, subject, COLUMNS)
            for index, row in plain_rows(rows):
                answer = truths.get(row["id"], {}).get("ground_truth", row["answer"])
                questions.append(to_question(row, answer, subject, stored_image(rows, index, "image_1")))
        return questions

    def generation(self, options):
        """Return sampling with five beams for FlagPerf's way; images are not padded in either."""
        sampling = SAMPLING if options.variant == "flagperf" else {}
        return {"image_aspect_ratio": "square", **sampling}

    def score_one(self, question, answer):
        """Return whether the answer is right; one without a letter is wrong here."""
        return score(answer, *question.truth)

    def score(self, questions, answers, options):
        """Return the accuracy of all questions, of each domain and of each subject."""
        parsed, num_drawn = read_letters(questions, answers)
        each = [
            score_choice(value, q.truth.answer) if q.truth.options else score_open(parse_open(value), q.truth.answer)
            for q, value in zip(questions, parsed, strict=True)
        ]
        found = aggregate(each, [question.category for question in questions])
        table = {name: 100 * row["acc"] for name, row in found.items() if name != "Overall"}
        note = (
            f"{num_drawn:,} of {len(answers):,} answers name no choice and were given one at random (seed 42), as "
            "MMMU's program does."
        )
        return score_mean(self.metric, each, table, notes=(note,))

    def write(self, out, questions, answers, options):
        """Write what MMMU's main_eval_only.py takes: {id: letter, or the open answer}."""
        parsed, _ = read_letters(questions, answers)
        found = {question.id: value for question, value in zip(questions, parsed, strict=True)}
        return [write_json(out / "total_val_output.json", found)]


def to_question(row, answer, subject: str, image) -> Question:
    """Return the question of a row, with the prompt of MMMU's config for LLaVA-1.5."""
    if row["question_type"] != "multiple-choice":
        truth = Truth(read_list(answer) or answer, None)
        return Question(row["id"], row["question"] + SHORT_ANSWER, (image,), subject, truth)
    choices = read_options(row)
    lines = "".join(f"({letter}) {choice}\n" for letter, choice in choices.items())
    return Question(row["id"], f"{row['question']}\n{lines}{OPTION_LETTER}", (image,), subject, Truth(answer, choices))


def read_options(row) -> dict[str, str]:
    """Return {letter: option} of a row, which holds them as the text of a list; ValueError for anything else."""
    choices = read_list(row["options"])
    if not choices:
        raise ValueError(f"question {row['id']!r} has the options {row['options']!r}; expected the text of a list.")
    return {chr(ord("A") + i): choice for i, choice in enumerate(choices)}


def read_list(text) -> list[str]:
    """Return the texts of a list that is written as text, as in "['24/7', '3.429']"; [] for anything else."""
    try:
        found = ast.literal_eval(text) if isinstance(text, str) and text.startswith("[") else text
    except (ValueError, SyntaxError):
        return []
    is_texts = isinstance(found, list) and all(isinstance(one, str) for one in found)
    return found if is_texts else []


def read_letters(questions, answers) -> tuple[list[str], int]:
    """Return the letter of each answer, open answers as they are, and how many letters were drawn at random."""
    draws = Draws()
    parsed = [
        answer if question.truth.options is None else parse_choice(answer, question.truth.options, draws)
        for question, answer in zip(questions, answers, strict=True)
    ]
    return parsed, draws.count
