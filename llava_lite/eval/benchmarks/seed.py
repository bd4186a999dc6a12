"""SEED-Bench: multiple choice about an image or a frame of a video, of twelve types (arXiv 2307.16125).

Li et al. 2023. Papers that report one figure of LLaVA-1.5 mean images and videos together. Of a video LLaVA shows the
frame in the middle.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from llava_lite.eval.benchmarks.base import EVAL_ZIP, Benchmark, Need, image_groups, score_mean
from llava_lite.eval.benchmarks.files import (
    check_same,
    look_up,
    open_table,
    plain_rows,
    read_json,
    read_questions,
    shared_images,
    write_text,
)
from llava_lite.eval.questions import OPTION_LETTER, Question
from llava_lite.eval.scoring.letters import aggregate_seed, score_seed

SITE = "https://huggingface.co/datasets/AILab-CVC/SEED-Bench"
QUESTIONS = "llava-seed-bench.jsonl"
ANNOTATIONS = "SEED-Bench.json"
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
# Of SEED-Bench.json, for tables, which lack them; 3 and 4 are swapped between its copies and have no name here.
TYPES = {1: "Scene Understanding", 2: "Instance Identity", 5: "Instances Counting", 6: "Spatial Relation"}
TYPES |= {7: "Instance Interaction", 8: "Visual Reasoning", 9: "Text Understanding", 10: "Action Recognition"}
TYPES |= {11: "Action Prediction", 12: "Procedure Understanding"}


class Truth(NamedTuple):
    """The right letter, image or video, the name of the question's type, and the question's id in the upload."""

    letter: str
    kind: str
    type: str
    upload_id: str


class Seed(Benchmark):
    """SEED-Bench, as in LLaVA's playground/data/eval/seed_bench."""

    name = "seed"
    title = "SEED-Bench"
    directory = "seed_bench"
    metric = "accuracy of images and videos together, %"
    source = SITE
    needs = (
        Need(QUESTIONS, EVAL_ZIP),
        Need(ANNOTATIONS, SITE),
        Need("SEED-Bench-image", f"{SITE}, SEED-Bench-image.zip"),
        Need("SEED-Bench-video-image", "the videos, by extract_video_frames.py of LLaVA's eval.zip"),
    )

    def load(self, directory, options):
        """Return the questions, each with its Truth."""
        self.num_not_asked = 0
        if self.has_tables_alone(directory, options):
            return self.from_table(directory)
        path = directory / (options.questions or QUESTIONS)
        # A file of questions about images needs no frames of videos.
        self.check(directory, self.needs[1:3] if options.questions else self.needs)
        found = read_json(directory / ANNOTATIONS)
        names = {number: name for name, number in found["question_type"].items()}
        truths = {str(item["question_id"]): item for item in found["questions"]}
        questions = []
        for _, question in read_questions(path, directory):
            item = look_up(truths, str(question.id), path, directory / ANNOTATIONS)
            check_same(question, [item["question"], to_options(item)], path, directory / ANNOTATIONS)
            questions.append(question._replace(truth=to_truth(item, names)))
        self.num_not_asked = 0 if options.questions else len(truths) - len({str(one.id) for one in questions})
        return questions

    def from_table(self, directory):
        """Return the questions of Hugging Face's table, where a video is a list of frames."""
        rows = open_table(directory, "test", columns=("image", "question", *CHOICES, "answer", "data_type"))
        image, questions = shared_images(rows, "image", "data_id"), []
        for index, row in plain_rows(rows):
            text = f"{row['question']}\n{to_options(row)}{OPTION_LETTER}"
            truth = to_truth(row, TYPES)
            questions.append(Question(row["question_id"], text, (image(index, row),), truth=truth))
        return questions

    def score_one(self, question, answer):
        """Return whether the answer is exactly the letter."""
        return score_seed(answer, question.truth.letter)

    def score(self, questions, answers, options):
        """Return the accuracy of all questions, and of images, videos and each type."""
        each = [self.score_one(*one) for one in zip(questions, answers, strict=True)]
        truths = [question.truth for question in questions]
        parts = aggregate_seed(each, [truth.kind for truth in truths], [truth.type for truth in truths])
        table = {name: 100 * value for name, value in parts.items() if name != "total"}
        notes = ()
        if self.num_not_asked:
            with_all = 100 * sum(each) / (len(each) + self.num_not_asked)
            notes = (
                f"{self.num_not_asked:,} questions of {ANNOTATIONS} are not in {QUESTIONS}; LLaVA's program counts "
                f"them as wrong, which gives {with_all:.1f}.",
            )
        return score_mean(self.metric, each, table, image_groups(questions), notes)

    def write(self, out, questions, answers, options):
        """Write the upload: a line of each question with the answer as it came."""
        pairs = zip(questions, answers, strict=True)
        lines = [{"question_id": one.truth.upload_id, "prediction": answer} for one, answer in pairs]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        return [write_text(out / "seed_upload.jsonl", text)]


def to_options(item) -> str:
    """Return the choices of a question of SEED-Bench.json or of a row, a line each."""
    return "\n".join(f"{letter}. {item[choice]}" for letter, choice in zip("ABCD", CHOICES, strict=True))


def to_truth(item, names) -> Truth:
    """Return the truth of a question of SEED-Bench.json or of a row. names: {number: name} of the types."""
    number = item.get("question_type_id")
    number = int(number) if number is not None else None
    kind = "no type" if number is None else names.get(number, f"type {number}")
    return Truth(item["answer"], item["data_type"], kind, str(item["question_id"]))
