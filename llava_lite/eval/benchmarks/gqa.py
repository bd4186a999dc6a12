"""GQA: questions made from the scene graph of a photo; the answer is a word (arXiv 1902.09506).

Hudson and Manning 2019. Papers report testdev_balanced.
"""

from __future__ import annotations

from llava_lite.eval.benchmarks.base import EVAL_ZIP, Benchmark, Need, image_groups, score_mean
from llava_lite.eval.benchmarks.files import (
    check_asked,
    check_same,
    check_same_image,
    look_up,
    open_table,
    plain_rows,
    read_json,
    read_questions,
    stored_image,
    write_json,
)
from llava_lite.eval.questions import SHORT_ANSWER, Question
from llava_lite.eval.scoring import gqa

SITE = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
QUESTIONS = "llava_gqa_testdev_balanced.jsonl"
TRUTHS = "testdev_balanced_questions.json"
# Where people unpack GQA's questions1.2.zip.
PLACES = ("data", "data/questions1.2", "data/questions", "data/eval")


class Gqa(Benchmark):
    """The balanced test-dev part of GQA, as in LLaVA's playground/data/eval/gqa."""

    name = "gqa"
    title = "GQA test-dev balanced"
    directory = "gqa"
    source = SITE
    needs = (
        Need(QUESTIONS, EVAL_ZIP),
        Need(f"data/{TRUTHS}", f"questions1.2.zip of {SITE}"),
        Need("data/images", f"images.zip of {SITE}"),
    )

    def load(self, directory, options):
        """Return the questions; the truth is (answer, structural type, semantic type)."""
        if self.has_tables_alone(directory, options):
            return self.from_table(directory)
        found = next((place for place in PLACES if (directory / place / TRUTHS).is_file()), None)
        needed = [need for need in self.needs if not (need.path.endswith(TRUTHS) and found)]
        self.check(directory, needed[1:] if options.questions else needed)
        truth_path, path = directory / found / TRUTHS, directory / (options.questions or QUESTIONS)
        truths = {key: item for key, item in read_json(truth_path).items() if item.get("isBalanced", True)}
        questions = []
        for _, question in read_questions(path, directory / "data/images"):
            item = look_up(truths, str(question.id), path, truth_path)
            check_same(question, [item["question"]], path, truth_path)
            check_same_image(question, f"{item['imageId']}.jpg", path, truth_path)
            questions.append(question._replace(truth=to_truth(item)))
        if not options.questions:
            check_asked([str(question.id) for question in questions], truths, path, truth_path)
        return questions

    def from_table(self, directory):
        """Return the questions of Hugging Face's tables: one of questions, one of images."""
        columns = ("id", "imageId", "question", "answer")
        rows = open_table(directory, "testdev", "testdev_balanced_instructions", columns)
        photos = open_table(directory, "testdev", "testdev_balanced_images", ("id", "image"))
        images = {key: stored_image(photos, index, "image") for index, key in enumerate(photos["id"])}
        questions = []
        for _, row in plain_rows(rows):
            image = look_up(
                images,
                row["imageId"],
                directory / "testdev_balanced_instructions",
                directory / "testdev_balanced_images",
            )
            questions.append(Question(row["id"], row["question"] + SHORT_ANSWER, (image,), truth=to_truth(row)))
        return questions

    def score_one(self, question, answer):
        """Return whether the answer is the word."""
        return gqa.score(answer, question.truth[0])

    def score(self, questions, answers, options):
        """Return the accuracy, and that of binary and open questions and of each type."""
        each = [self.score_one(*one) for one in zip(questions, answers, strict=True)]
        _, structural, semantic = zip(*(question.truth for question in questions), strict=True)
        parts = gqa.aggregate(each, structural, semantic)
        table = {name: 100 * parts[name] for name in ("binary", "open") if name in parts}
        for name in ("structural", "semantic"):
            table |= {f"{name}: {kind}": 100 * value for kind, value in sorted(parts[name].items())}
        return score_mean(self.metric, each, table, image_groups(questions))

    def write(self, out, questions, answers, options):
        """Write the file that GQA's own eval.py reads."""
        pairs = zip(questions, answers, strict=True)
        found = [{"questionId": str(question.id), "prediction": gqa.normalize(answer)} for question, answer in pairs]
        return [write_json(out / "testdev_balanced_predictions.json", found)]


def to_truth(item) -> tuple[str, str, str]:
    """Return answer, structural and semantic type of a question of GQA."""
    types = item.get("types") or {}
    return item["answer"], types.get("structural") or "unknown", types.get("semantic") or "unknown"
