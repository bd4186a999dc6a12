"""COCO captions: one sentence about an image, compared with those of five people.

Chen et al. 2015, arXiv 1504.00325. The prompt is that of lmms-eval; CIDEr is computed by pycocoevalcap.
"""

from __future__ import annotations

import re

from llava_lite.eval.benchmarks.base import Benchmark, Need, Scores
from llava_lite.eval.benchmarks.files import has_tables, open_table, plain_rows, read_json, stored_image, write_json
from llava_lite.eval.questions import Question
from llava_lite.eval.scoring.cider import cider

PROMPT = "Provide a one-sentence caption for the provided image."
LINK = "http://images.cocodataset.org/"


class Coco(Benchmark):
    """Captions of COCO's validation images, from its own files or from a table of Hugging Face."""

    name = "coco"
    title = "COCO captions"
    directory = "coco"
    metric = "CIDEr, times 100"
    source = "https://cocodataset.org"
    splits = ("val2017", "val2014")
    max_new_tokens = 64
    needs = (
        Need("annotations/captions_val2017.json", f"{LINK}annotations/annotations_trainval2017.zip"),
        Need("val2017", f"{LINK}zips/val2017.zip"),
    )
    test_needs = (Need("annotations", f"{LINK}annotations/annotations_trainval2014.zip"),)

    def load(self, directory, options):
        """Return one question an image, in the order of the file."""
        split = options.split
        name = options.questions or f"annotations/captions_{split}.json"
        if not (directory / name).is_file():
            if has_tables(directory) and options.questions is None:
                return self.from_table(directory, split)
            year = split.removeprefix("val")
            missing = [Need(name, f"{LINK}annotations/annotations_trainval{year}.zip")]
            raise FileNotFoundError(
                self.missing_message(directory, [*missing, Need(split, f"{LINK}zips/{split}.zip")])
            )
        found = read_json(directory / name)
        captions: dict[int, list[str]] = {image["id"]: [] for image in found["images"]}
        for one in found["annotations"]:
            if one["image_id"] not in captions:
                raise ValueError(
                    f"{directory / name}: a caption is about image {one['image_id']}, which is not in its images."
                )
            captions[one["image_id"]].append(one["caption"])
        return [
            Question(image["id"], PROMPT, (str(directory / split / image["file_name"]),), truth=captions[image["id"]])
            for image in found["images"]
        ]

    def from_table(self, directory, split):
        """Return the questions of lmms-lab's table, whose question_id is the name of the image."""
        rows = open_table(directory, "val", columns=("question_id", "answer", "image"))
        other = next(one for one in self.splits if one != split)
        if len(rows) and other in rows[0]["question_id"]:
            raise ValueError(f"{directory} holds the table of {other}: give --split {other}.")
        return [
            Question(read_id(row["question_id"]), PROMPT, (stored_image(rows, i, "image"),), truth=list(row["answer"]))
            for i, row in plain_rows(rows)
        ]

    def score(self, questions, answers, options):
        """Return CIDEr; None with the reason where pycocoevalcap or Java is missing."""
        try:
            total, each = cider(answers, [question.truth for question in questions])
        except (ImportError, RuntimeError) as error:
            return Scores(
                self.metric, None, notes=(str(error), "The captions are written, and a later run scores them.")
            )
        return Scores(self.metric, 100 * total, each=each)

    def write(self, out, questions, answers, options):
        """Write what COCO's server and pycocoevalcap take: a list of {image_id, caption}."""
        found = [{"image_id": q.id, "caption": a} for q, a in zip(questions, answers, strict=True)]
        return [write_json(out / f"captions_{options.split}_results.json", found)]


def read_id(name: str) -> int:
    """Return the number of an image in its name; ValueError for a name without one."""
    digits = re.findall(r"\d+", name.rpartition(".")[0] or name)
    if not digits:
        raise ValueError(f"the image {name!r} has no number in its name; expected COCO_val2014_000000000042.jpg.")
    return int(digits[-1])
