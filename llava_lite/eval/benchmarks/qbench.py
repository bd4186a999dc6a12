"""Q-Bench: questions about the quality of an image: is it sharp, what spoils it (Wu et al. 2024, arXiv 2309.14181).

Its first task, perception (LLVisionQA). The prompt and the images, which are not padded, are those of MoE-LLaVA's
program; a letter is read as lmms-eval does, without its random guess. The answers of the test split are not public.
"""

from __future__ import annotations

import json

from llava_lite.eval.benchmarks.base import Benchmark, Need, Scores, image_groups, score_mean
from llava_lite.eval.benchmarks.files import has_tables, open_table, plain_rows, read_json, stored_image, write_text
from llava_lite.eval.questions import Question
from llava_lite.eval.scoring.letters import parse_qbench, score_qbench

SOURCE = "https://huggingface.co/datasets/nanyangtu/LLVisionQA-QBench"
# MoE-LLaVA's page and its script write it in two ways.
IMAGES = ("images_llvisionqa", "images_llviqionqa")


class QBench(Benchmark):
    """Q-Bench's perception, from its own files or from Hugging Face's table."""

    name = "qbench"
    title = "Q-Bench"
    directory = "qbench"
    source = "https://github.com/Q-Future/Q-Bench"
    splits = ("dev", "test")
    max_new_tokens = 1024
    needs = (Need("llvisionqa_dev.json", SOURCE), Need(IMAGES[0], SOURCE))
    test_needs = (Need("llvisionqa_test.json", SOURCE),)

    def load(self, directory, options):
        """Return the questions of a split."""
        name = options.questions or f"llvisionqa_{options.split}.json"
        if not (directory / name).is_file() and options.questions is None and has_tables(directory):
            rows = open_table(directory, options.split, columns=("question", "option0", "option1", "image"))
            return [from_row(i, row, stored_image(rows, i, "image")) for i, row in plain_rows(rows)]
        images = next((found for found in IMAGES if (directory / found).is_dir()), IMAGES[0])
        missing = [need for need in (Need(name, SOURCE), Need(images, SOURCE)) if not (directory / need.path).exists()]
        if missing:
            raise FileNotFoundError(self.missing_message(directory, missing))
        return [
            from_record(i, item, str(directory / images / item["img_path"]), directory / name)
            for i, item in enumerate(read_json(directory / name))
        ]

    def generation(self, options):
        """Return that images are not padded."""
        return {"image_aspect_ratio": "square"}

    def score_one(self, question, answer):
        """Return whether the answer names the right letter; None where the split has no answers."""
        letter, choices, _ = question.truth
        return None if letter is None else score_qbench(answer, letter, choices)

    def score(self, questions, answers, options):
        """Return the accuracy; None where the split has no answers."""
        each = [self.score_one(*one) for one in zip(questions, answers, strict=True)]
        if None in each:
            return Scores(
                self.metric,
                None,
                notes=("The answers of this split are not public: send the file as Q-Bench's repository says.",),
            )
        unread = sum(parse_qbench(a, q.truth[1]) is None for q, a in zip(questions, answers, strict=True))
        note = f"{unread:,} of {len(answers):,} answers name no letter and are wrong."
        return score_mean(self.metric, each, groups=image_groups(questions), notes=(note,))

    def write(self, out, questions, answers, options):
        """Write the records with the answers as `response`, one a line."""
        lines = [{**q.truth[2], "response": a} for q, a in zip(questions, answers, strict=True)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        return [write_text(out / f"llvisionqa_{options.split}_responses.jsonl", text)]


def from_record(index, item, image, path) -> Question:
    """Return the question of a record; ValueError if its right answer is none of its candidates."""
    choices = {chr(ord("A") + i): text for i, text in enumerate(item["candidates"])}
    right = item.get("correct_ans")
    letter = (
        None if right is None else next((one for one, text in choices.items() if text.strip() == right.strip()), None)
    )
    if right is not None and letter is None:
        raise ValueError(
            f"{path}, record {index}: the right answer {right!r} is none of its candidates {list(choices.values())}."
        )
    return to_question(index, item["question"], choices, letter, image, item)


def from_row(index, row, image) -> Question:
    """Return the question of a row of Hugging Face's table, whose missing options are N/A."""
    texts = [row[f"option{i}"] for i in range(4) if row.get(f"option{i}") not in (None, "", "N/A")]
    choices = {chr(ord("A") + i): text for i, text in enumerate(texts)}
    letter = row.get("correct_choice")
    if letter in ("", "N/A"):
        letter = None
    if letter is not None and letter not in choices:
        raise ValueError(f"row {index}: the right choice is {letter!r}; expected one of {', '.join(choices)}.")
    return to_question(index, row["question"], choices, letter, image, row)


def to_question(index, text, choices, letter, image, record) -> Question:
    """Return a question with the prompt of MoE-LLaVA's program."""
    lines = "".join(f"{one}. {choice}\n" for one, choice in choices.items())
    text = f"{text}\nChoose between one of the options as follows:\n{lines}"
    return Question(index, text, (image,), truth=(letter, choices, record))
