"""DocVQA: questions about scanned documents, whose answers are words of the document.

Mathew et al. 2021, arXiv 2007.00398. The score is ANLS; the answers of the test split are known to its server alone.
"""

from __future__ import annotations

from llava_lite.eval.benchmarks.base import Benchmark, Need, Scores, image_groups, score_mean
from llava_lite.eval.benchmarks.files import has_tables, open_table, plain_rows, read_json, stored_image, write_json
from llava_lite.eval.questions import SHORT_ANSWER, Question
from llava_lite.eval.scoring.anls import score

SERVER = "https://rrc.cvc.uab.es/?ch=17"
# The names of the question files of each split, the first that is there is read.
FILES = {
    "val": ("val_v1.0_withQT.json", "spdocvqa_qas/val_v1.0_withQT.json", "val_v1.0.json"),
    "test": ("test_v1.0.json", "spdocvqa_qas/test_v1.0.json"),
}
COLUMNS = ("questionId", "question", "image")
# The directory of the images, as they are unpacked.
IMAGES = ("documents", "spdocvqa_images")


class DocVQA(Benchmark):
    """DocVQA (task 1, single documents), from its own files or from a table of Hugging Face."""

    name = "docvqa"
    title = "DocVQA"
    directory = "docvqa"
    metric = "ANLS, %"
    source = SERVER
    splits = ("val", "test")
    max_new_tokens = 32
    needs = (Need(FILES["val"][0], SERVER), Need(IMAGES[0], SERVER))
    test_needs = tuple(Need(name, SERVER) for name in ("test_v1.0.json", "spdocvqa_qas", "spdocvqa_images"))

    def load(self, directory, options):
        """Return the questions of a split."""
        names = (options.questions,) if options.questions else FILES[options.split]
        file = next((directory / name for name in names if (directory / name).is_file()), None)
        if file is None and has_tables(directory) and options.questions is None:
            rows = open_table(directory, {"val": "validation"}.get(options.split, options.split), "DocVQA", COLUMNS)
            return [to_question(row, stored_image(rows, i, "image")) for i, row in plain_rows(rows)]
        if file is None:
            missing = [Need(names[0], SERVER), Need(IMAGES[0], SERVER)]
            raise FileNotFoundError(self.missing_message(directory, missing))
        images = next((directory / name for name in IMAGES if (directory / name).is_dir()), directory)
        found = read_json(file)
        if not isinstance(found, dict) or "data" not in found:
            raise ValueError(f"{file} has no list 'data' of questions; expected the file of DocVQA's server.")
        return [to_question(item, str(images / item["image"].rpartition("/")[2])) for item in found["data"]]

    def score_one(self, question, answer):
        """Return the ANLS of an answer; None where the split has no answers."""
        return score(answer, question.truth) if question.truth else None

    def score(self, questions, answers, options):
        """Return the mean ANLS, and the share of answers that are exactly right."""
        each = [self.score_one(*one) for one in zip(questions, answers, strict=True)]
        if None in each:
            return Scores(self.metric, None, notes=(f"The answers of this split are not public: upload to {SERVER}",))
        table = {"exactly right": 100 * sum(one == 1 for one in each) / len(each)}
        return score_mean(self.metric, each, table, image_groups(questions))

    def write(self, out, questions, answers, options):
        """Write what DocVQA's server takes: a list of {questionId, answer}."""
        found = [{"questionId": q.id, "answer": a} for q, a in zip(questions, answers, strict=True)]
        return [write_json(out / f"docvqa_{options.split}_upload.json", found)]


def to_question(item, image) -> Question:
    """Return the question of a record, with all answers that count as right; none in the test split."""
    truths = tuple(item.get("answers") or ())
    return Question(int(item["questionId"]), item["question"] + SHORT_ANSWER, (image,), "default", truths)
