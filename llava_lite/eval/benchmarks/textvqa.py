"""TextVQA: a question about the text in an image, with the answers of ten people (arXiv 1904.08920).

Singh et al. 2019. LLaVA asks it with the text that an OCR program found, and scores by M4C's rule; without that text
the figure is another one, far lower.
"""

from __future__ import annotations

from llava_lite.eval.benchmarks.base import EVAL_ZIP, Benchmark, Need, image_groups, score_mean
from llava_lite.eval.benchmarks.files import (
    check_no_repeats,
    look_up,
    open_table,
    plain_rows,
    read_json,
    read_questions,
    shared_images,
)
from llava_lite.eval.questions import SHORT_ANSWER, Question
from llava_lite.eval.scoring.vqa_text import soft_accuracy

ANNOTATIONS = "TextVQA_0.5.1_val.json"
QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"
OCR = "Reference OCR token: "


class TextVqa(Benchmark):
    """The validation part of TextVQA, as in LLaVA's playground/data/eval/textvqa."""

    name = "textvqa"
    title = "TextVQA val"
    directory = "textvqa"
    metric = "soft accuracy, %"
    source = "https://textvqa.org"
    variants = ("ocr", "no_ocr")
    needs = (
        Need(QUESTIONS, EVAL_ZIP),
        Need(ANNOTATIONS, f"https://dl.fbaipublicfiles.com/textvqa/data/{ANNOTATIONS}"),
        Need("train_images", "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"),
    )

    def load(self, directory, options):
        """Return the questions, each with its ten answers as its truth."""
        if self.has_tables_alone(directory, options):
            return self.from_table(directory, options)
        self.check(directory, self.needs[1:] if options.questions else self.needs)
        truths = {
            (item["image_id"], item["question"].lower()): item["answers"]
            for item in read_json(directory / ANNOTATIONS)["data"]
        }
        path, questions = directory / (options.questions or QUESTIONS), []
        for _, question in read_questions(path, directory / "train_images"):
            asked = cut_question(question.text)
            answers = look_up(truths, (question.id, asked.lower()), path, directory / ANNOTATIONS)
            text = question.text if options.variant == "ocr" else asked + SHORT_ANSWER
            questions.append(question._replace(text=text, truth=answers))
        check_no_repeats([(question.id, cut_question(question.text)) for question in questions], path)
        return questions

    def from_table(self, directory, options):
        """Return the questions of Hugging Face's table."""
        rows = open_table(
            directory, "validation", columns=("image", "question", "question_id", "answers", "ocr_tokens")
        )
        image, questions = shared_images(rows, "image", "image_id"), []
        for index, row in plain_rows(rows):
            tokens = row["ocr_tokens"] if options.variant == "ocr" else []
            ocr = f"\n{OCR}{', '.join(tokens)}" if tokens else ""
            key = row.get("image_id", row["question_id"])
            text = row["question"] + ocr + SHORT_ANSWER
            questions.append(Question(key, text, (image(index, row),), truth=row["answers"]))
        return questions

    def score_one(self, question, answer):
        """Return the soft accuracy of an answer."""
        return soft_accuracy(answer, question.truth)

    def score(self, questions, answers, options):
        """Return the mean soft accuracy."""
        each = [self.score_one(*one) for one in zip(questions, answers, strict=True)]
        notes = ("Asked without OCR tokens; the figures of papers are with them.",)
        return score_mean(
            self.metric, each, groups=image_groups(questions), notes=notes if options.variant == "no_ocr" else ()
        )


def cut_question(text: str) -> str:
    """Return the question of a line of LLaVA's file, without its OCR tokens and its ending."""
    lines = text.removesuffix(SHORT_ANSWER).split("\n")
    rest = [line for line in lines if not line.startswith(OCR.rstrip())]
    if len(rest) != 1 or len(lines) > 2:
        raise ValueError(f"{text!r} is no question of LLaVA's TextVQA: expected a line, and one of OCR tokens.")
    return rest[0]
