"""VQAv2: a question about a photo, with the answers of ten people (arXiv 1612.00837).

Goyal et al. 2017. Papers report test-dev, which EvalAI's server scores; val is scored here.
"""

from __future__ import annotations

from llava_lite.eval.benchmarks.base import EVAL_ZIP, Benchmark, Need, Scores, image_groups, percents, score_mean
from llava_lite.eval.benchmarks.files import (
    check_same_image,
    look_up,
    open_table,
    plain_rows,
    read_json,
    read_lines,
    read_questions,
    shared_images,
    write_json,
)
from llava_lite.eval.questions import SHORT_ANSWER, Question
from llava_lite.eval.scoring.vqa_text import process_answer, process_vqav2_answer, soft_accuracy

SERVER = "https://eval.ai/web/challenges/challenge-page/830"
VAL_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
VAL_ANSWERS = "v2_mscoco_val2014_annotations.json"
TEST_QUESTIONS = "llava_vqav2_mscoco_{}2015.jsonl"
VQA = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
COLUMNS = ("image", "question", "question_id")


class VqaV2(Benchmark):
    """VQAv2, as in LLaVA's playground/data/eval/vqav2."""

    name = "vqav2"
    title = "VQAv2"
    directory = "vqav2"
    metric = "soft accuracy, %"
    source = "https://visualqa.org"
    splits = ("val", "test-dev", "test")
    needs = (
        Need(VAL_QUESTIONS, f"{VQA}/v2_Questions_Val_mscoco.zip"),
        Need(VAL_ANSWERS, f"{VQA}/v2_Annotations_Val_mscoco.zip"),
        Need("val2014", "http://images.cocodataset.org/zips/val2014.zip"),
    )
    test_needs = (
        Need(TEST_QUESTIONS.format("test-dev"), EVAL_ZIP),
        Need(TEST_QUESTIONS.format("test"), EVAL_ZIP),
        Need("test2015", "http://images.cocodataset.org/zips/test2015.zip"),
    )

    def load(self, directory, options):
        """Return the questions; the truth of val is (type of the answer, ten answers)."""
        needs = self.needs if options.split == "val" else self.test_needs
        if self.has_tables_alone(directory, options, needs):
            return self.from_table(directory, options)
        self.check(directory, needs)
        if options.split == "val":
            return self.load_val(directory, options)
        path = directory / (options.questions or TEST_QUESTIONS.format(options.split))
        questions = [question for _, question in read_questions(path, directory / "test2015")]
        ids_path = directory / TEST_QUESTIONS.format("test")
        self.upload_ids = {read_id(item, ids_path): None for item in read_lines(ids_path, ("question_id",))}
        questions = [question._replace(id=read_id(question, path)) for question in questions]
        for question in questions:
            look_up(self.upload_ids, question.id, path, ids_path)
        return questions

    def load_val(self, directory, options):
        """Return the questions of val from the files of VQA."""
        truth_path = directory / VAL_ANSWERS
        truths = {read_id(item, truth_path): item for item in read_json(truth_path)["annotations"]}
        path = directory / (options.questions or VAL_QUESTIONS)
        if options.questions:
            questions = [question for _, question in read_questions(path, directory / "val2014")]
        else:
            questions = [
                Question(
                    item["question_id"],
                    item["question"] + SHORT_ANSWER,
                    (str(directory / "val2014" / image_name(item)),),
                )
                for item in read_json(path)["questions"]
            ]
        found = []
        for question in questions:
            question = question._replace(id=read_id(question, path))
            item = look_up(truths, question.id, path, truth_path)
            check_same_image(question, image_name(item), path, truth_path)
            truth = item["answer_type"], [answer["answer"] for answer in item["answers"]]
            found.append(question._replace(truth=truth))
        return found

    def from_table(self, directory, options):
        """Return the questions of Hugging Face's table: validation, test, and testdev where it is there."""
        if options.split == "val":
            rows = open_table(directory, "validation", columns=(*COLUMNS, "answers"))
        else:
            rows = tests = open_table(directory, "test", columns=COLUMNS)
            if options.split == "test-dev":
                rows = open_table(directory, "testdev", columns=COLUMNS)
            self.upload_ids = dict.fromkeys(int(key) for part in (tests, rows) for key in part["question_id"])
        image, questions = shared_images(rows, "image", "image_id"), []
        for index, row in plain_rows(rows):
            truth = None
            if options.split == "val":
                truth = row.get("answer_type", "other"), [answer["answer"] for answer in row["answers"]]
            text = row["question"] + SHORT_ANSWER
            questions.append(Question(int(row["question_id"]), text, (image(index, row),), truth=truth))
        return questions

    def score_one(self, question, answer):
        """Return the soft accuracy of an answer; None in the test parts."""
        return None if question.truth is None else soft_accuracy(answer, question.truth[1], process_vqav2_answer)

    def score(self, questions, answers, options):
        """Return the mean soft accuracy of val, and of each type of answer."""
        if options.split != "val":
            return Scores(self.metric, None, notes=(f"Upload the file to {SERVER}, which scores it.",))
        each = [self.score_one(*one) for one in zip(questions, answers, strict=True)]
        table = percents(each, [question.truth[0] for question in questions])
        notes = ("This is val; the figures of papers are test-dev.",)
        return score_mean(self.metric, each, table, image_groups(questions), notes)

    def write(self, out, questions, answers, options):
        """Write the upload of a test part: an answer to every question of test2015, empty where it was not asked."""
        if options.split == "val":
            return []
        found = {one.id: process_answer(answer) for one, answer in zip(questions, answers, strict=True)}
        upload = [{"question_id": key, "answer": found.get(key, "")} for key in self.upload_ids]
        return [write_json(out / f"vqav2_{options.split}_upload.json", upload)]


def read_id(item, path) -> int:
    """Return the id of a question or of a line, a number that some files write as a text; ValueError for another."""
    key = item.id if isinstance(item, Question) else item["question_id"]
    if isinstance(key, int) or (isinstance(key, str) and key.isdecimal()):
        return int(key)
    raise ValueError(f"{path}: the question_id {key!r} is no number; the ids of VQAv2 are numbers, such as 262148000.")


def image_name(item) -> str:
    """Return the name of the image of a question of val, or of its annotation."""
    return f"COCO_val2014_{int(item['image_id']):012d}.jpg"
