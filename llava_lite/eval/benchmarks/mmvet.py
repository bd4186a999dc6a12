"""MM-Vet: 218 questions that need several abilities at once, answered freely and graded by a judge (arXiv 2308.02490).

Yu et al. 2023. The judge sees question, truth and answer, after examples of all grades, and gives 0.0 to 1.0. The
rule, temperature, retries and the grade of 0 after them are those of MM-Vet's program; the instruction says the same
in our words, the seven examples are ours, and texts stand on one line, so grades may differ a little even with the
paper's judge.
"""

from __future__ import annotations

from pathlib import Path

from llava_lite.eval.benchmarks.base import Benchmark, Need, percents, score_mean
from llava_lite.eval.benchmarks.files import (
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
from llava_lite.eval.benchmarks.llavabench import judged_by, unjudged
from llava_lite.eval.judge import Judge, Review, review_all
from llava_lite.eval.questions import Question

SOURCE = "https://github.com/yuweihao/MM-Vet/releases (mm-vet.zip)"
PAPER_JUDGE = "gpt-4-0613"
# Recognition, reading text, knowledge, writing, where things are, arithmetic.
ABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
NUM_TRIES = 6
COLUMNS = ("question_id", "question", "answer", "capability", "image")
RULE = """\
Compare a prediction with the ground truth, and say how correct the prediction is: a figure from 0.0 (all wrong) to \
1.0 (all right), in steps of 0.1. <AND> in the ground truth means that every part has to be in the prediction, <OR> \
that one of the parts is enough. Complete the last line of the table with the figure.
"""
EXAMPLES = (
    ("Which animals are there?", "dog <AND> cat", "There are a dog and a cat.", "1.0"),
    ("Which animals are there?", "dog <AND> cat", "A dog sleeps on the sofa.", "0.5"),
    ("Which animals are there?", "dog <AND> cat", "Two birds.", "0.0"),
    ("What does it cost in total?", "$12 <OR> 12 <OR> twelve", "It costs 12 dollars.", "1.0"),
    ("What does it cost in total?", "$12 <OR> 12 <OR> twelve", "It costs 21 dollars.", "0.0"),
    (
        "Why is this funny?",
        "A man irons his shirt on the roof of a yellow taxi that drives through a street.",
        "Ironing is done at home, and here a man does it on a car in the traffic.",
        "0.8",
    ),
    (
        "Why is this funny?",
        "A man irons his shirt on the roof of a yellow taxi that drives through a street.",
        "There is a yellow car in a street with many people.",
        "0.3",
    ),
)


class MMVet(Benchmark):
    """MM-Vet, as in LLaVA's playground/data/eval/mm-vet."""

    name = "mmvet"
    title = "MM-Vet"
    directory = "mm-vet"
    metric = "judged, %"
    source = SOURCE
    max_new_tokens = 1024
    is_judged = True
    needs = (Need("mm-vet.json", SOURCE), Need("images", SOURCE))

    def load(self, directory, options):
        """Return the questions of LLaVA's file, of MM-Vet's own where it is not there, or of Hugging Face's table."""
        if self.has_tables_alone(directory, options):
            rows = open_table(directory, "test", columns=COLUMNS)
            return [
                to_question(row["question_id"], row, stored_image(rows, index, "image"))
                for index, row in plain_rows(rows)
            ]
        self.check(directory)
        records = read_json(directory / "mm-vet.json")
        file = directory / (options.questions or "llava-mm-vet.jsonl")
        if not file.is_file() and options.questions is None:
            return [
                to_question(name, record, str(directory / "images" / record["imagename"]))
                for name, record in records.items()
            ]
        questions = []
        for _, question in read_questions(file, directory / "images"):
            record = look_up(records, f"v1_{question.id}", file, directory / "mm-vet.json")
            check_same(question, [record["question"]], file, directory / "mm-vet.json")
            check_same_image(question, record["imagename"], file, directory / "mm-vet.json")
            questions.append(question._replace(truth=read_truth(record)))
        return questions

    def score(self, questions, answers, options):
        """Return the mean grade, and that of each ability and of each set of them; None without a judge."""
        if options.judge is None:
            return unjudged(self.metric, f"{PAPER_JUDGE} in the paper")
        judge = Judge(options.judge, options.judge_model or PAPER_JUDGE)
        prompts = [to_prompt(*one) for one in zip(questions, answers, strict=True)]
        path = Path(options.out) / "reviews.jsonl"
        reviews = review_all(judge, path, prompts, ask_for_grade, [question.id for question in questions])
        each = [review.figures[0] if review.figures else 0.0 for review in reviews]
        sets = [question.truth[1] for question in questions]
        table = {}
        for ability in ABILITIES:
            mine = [grade for grade, needed in zip(each, sets, strict=True) if ability in needed]
            if mine:
                table[ability] = 100 * sum(mine) / len(mine)
        names = ["+".join(one) if len(one) > 1 else f"{one[0]} alone" for one in sets]
        table |= percents(each, names)
        notes = [judged_by(judge, PAPER_JUDGE)]
        num_empty = sum(review.figures is None for review in reviews)
        if num_empty:
            notes.append(f"{num_empty} of {len(each)} answers got no grade in {NUM_TRIES} tries and count as 0.")
        return score_mean(self.metric, each, table, notes=tuple(notes))

    def write(self, out, questions, answers, options):
        """Write what MM-Vet's own graders take: {id: answer}."""
        found = {f"v1_{question.id}": answer for question, answer in zip(questions, answers, strict=True)}
        return [write_json(out / "mm-vet_answers.json", found)]


def to_question(name: str, record, image) -> Question:
    """Return the question of a record of mm-vet.json; its id is the number in its name, as in LLaVA's file."""
    number = str(name).removeprefix("v1_")
    if not number.isdigit():
        raise ValueError(f"the question {name!r} of MM-Vet has no number; expected v1_0, v1_1, ...")
    return Question(int(number), record["question"], (image,), truth=read_truth(record))


def read_truth(record) -> tuple[str, tuple[str, ...]]:
    """Return answer and abilities of a record; a table of Hugging Face joins them by commas."""
    needed = record["capability"]
    names = needed.split(",") if isinstance(needed, str) else needed
    return record["answer"], tuple(sorted(name.strip() for name in names))


def to_prompt(question: Question, answer: str) -> str:
    """Return what the judge reads about an answer: the rule, and a table whose last line it completes."""
    rows = [("Question", "Ground truth", "Prediction", "Correctness"), ("---",) * 4, *EXAMPLES]
    lines = [" | ".join(row) for row in rows]
    truth = question.truth[0].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    texts = (" ".join(text.split()) for text in (question.text, truth, answer))
    return "\n".join([RULE, *lines, " | ".join(texts) + " | "])


def ask_for_grade(judge: Judge, prompt: str) -> Review:
    """Return the grade of a judge that is asked again, warmer and with a hint, while it gives none."""
    for attempt in range(NUM_TRIES):
        hint = "\nAnswer with the figure alone." if attempt else ""
        content = judge.ask(
            [{"role": "user", "content": prompt + hint}],
            temperature=min(0.5 * attempt, 2.0),
            max_tokens=16 if attempt else 3,
        )
        grade = read_grade(content)
        if grade is not None:
            return Review(content, [grade])
    return Review(content, None)


def read_grade(content: str) -> float | None:
    """Return the grade that a review begins with, None if it begins with anything but a number from 0 to 1."""
    try:
        grade = float(content.split()[0])
    except (ValueError, IndexError):
        return None
    return grade if 0 <= grade <= 1 else None
