"""LLaVA-Bench (in the wild): 60 questions about 24 photos, memes and drawings, answered freely and judged.

Liu et al. 2023, arXiv 2304.08485, section 5.1. The judge sees a description of the image, the question, the answer of
GPT-4 to the description, and the model's answer, and gives both a figure from 1 to 10; the score is the ratio of the
two sums. The order of the blocks, the temperature and the parsing are those of LLaVA; the instruction says the same in
our words, and a review without two figures is asked again and then left out, where LLaVA counts it as -1.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from urllib.parse import urlsplit

from llava_lite.eval.benchmarks.base import Benchmark, Need, Scores
from llava_lite.eval.benchmarks.files import (
    look_up,
    open_table,
    plain_rows,
    read_lines,
    read_questions,
    stored_image,
)
from llava_lite.eval.judge import Judge, Review, review_all
from llava_lite.eval.questions import Question
from llava_lite.eval.scoring.interval import bootstrap_interval

SOURCE = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
PAPER_JUDGE = "gpt-4-0314"
CATEGORIES = ("conv", "detail", "complex")
NUM_TRIES = 3
COLUMNS = ("question_id", "question", "caption", "gpt_answer", "category", "image")
SYSTEM = "You compare two answers of AI assistants, and judge their quality carefully and fairly."
RULE = (
    "Two AI assistants have answered the question of a user about an image. You do not see the image: the context "
    "above describes it. Rate how helpful, relevant, accurate and detailed each answer is, each with one figure from "
    "1 to 10, where more is better. Write on the first line nothing but the figure of Assistant 1 and the figure of "
    "Assistant 2, with a space between them. Explain them on the lines below; be fair, and do not let the order of "
    "the answers count."
)


class LlavaBench(Benchmark):
    """LLaVA-Bench in the wild, as in LLaVA's playground/data/eval/llava-bench-in-the-wild."""

    name = "llavabench"
    title = "LLaVA-Bench (wild)"
    directory = "llava-bench-in-the-wild"
    metric = "judged, % of GPT-4's answers"
    source = SOURCE
    max_new_tokens = 1024
    is_judged = True
    needs = tuple(Need(name, SOURCE) for name in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl", "images"))

    def load(self, directory, options):
        """Return the questions; the truth of each is the description of its image and GPT-4's answer."""
        if self.has_tables_alone(directory, options):
            rows = open_table(directory, "train", columns=COLUMNS)
            return [
                Question(
                    row["question_id"],
                    row["question"],
                    (stored_image(rows, index, "image"),),
                    row["category"],
                    (row["caption"], row["gpt_answer"]),
                )
                for index, row in plain_rows(rows)
            ]
        self.check(directory)
        file = directory / (options.questions or "questions.jsonl")
        context, answered = directory / "context.jsonl", directory / "answers_gpt4.jsonl"
        captions = {item["image"]: item["caption"] for item in read_lines(context, ("image", "caption"))}
        references = {str(item["question_id"]): item["text"] for item in read_lines(answered, ("question_id", "text"))}
        questions = []
        for item, question in read_questions(file, directory / "images"):
            caption = look_up(captions, item["image"], file, context)
            reference = look_up(references, str(question.id), file, answered)
            questions.append(question._replace(truth=(caption, reference)))
        return questions

    def score(self, questions, answers, options):
        """Return the ratio of the judge's figures, of all and of each category; None without a judge."""
        if options.judge is None:
            return unjudged(self.metric, f"{PAPER_JUDGE} in the paper")
        judge = Judge(options.judge, options.judge_model or PAPER_JUDGE)
        prompts = [to_prompt(*one) for one in zip(questions, answers, strict=True)]
        path = Path(options.out) / "reviews.jsonl"
        reviews = review_all(judge, path, prompts, ask_for_figures, [question.id for question in questions])
        pairs = [review.figures for review in reviews]
        table = {}
        for category in CATEGORIES:
            mine = [p for p, q in zip(pairs, questions, strict=True) if q.category == category and p is not None]
            if mine:
                table[category] = ratio(mine)
        judged = [pair for pair in pairs if pair is not None]
        table |= {"GPT-4's answers, of 100": 10 * statistics.fmean(pair[0] for pair in judged)}
        table |= {"the model's answers, of 100": 10 * statistics.fmean(pair[1] for pair in judged)}
        notes = [judged_by(judge, PAPER_JUDGE)]
        if len(judged) < len(pairs):
            notes.append(f"{len(pairs) - len(judged)} of {len(pairs)} reviews hold no two figures and are left out.")
        interval = bootstrap_interval(len(judged), lambda chosen: ratio([judged[i] for i in chosen]))
        each = [None if pair is None else pair[1] / 10 for pair in pairs]
        return Scores(self.metric, ratio(judged), interval, table, each, tuple(notes))


def to_prompt(question: Question, answer: str) -> str:
    """Return what the judge reads about an answer."""
    caption, reference = question.truth
    captions = "\n".join(caption) if isinstance(caption, list) else caption
    return (
        f"[Context]\n{captions}\n\n[Question]\n{question.text}\n\n"
        f"[Assistant 1]\n{reference}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{answer}\n\n[End of Assistant 2]\n\n[System]\n{RULE}\n\n"
    )


def ask_for_figures(judge: Judge, prompt: str) -> Review:
    """Return the review of a judge that is asked again while it gives no two figures."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
    for _ in range(NUM_TRIES):
        content = judge.ask(messages, temperature=0.2, max_tokens=1024)
        figures = read_figures(content)
        if figures is not None:
            break
    return Review(content, figures)


def read_figures(content: str) -> list[float] | None:
    """Return the two figures on the first line of a review, None for anything else."""
    try:
        figures = [float(word) for word in content.strip().partition("\n")[0].replace(",", " ").split()]
    except ValueError:
        return None
    return figures if len(figures) == 2 and figures[0] > 0 else None


def ratio(pairs) -> float:
    """Return the sum of the second figures in percent of that of the first ones."""
    return 100 * sum(second for _, second in pairs) / sum(first for first, _ in pairs)


def unjudged(metric: str, judge: str) -> Scores:
    """Return what stands for the score of a benchmark whose judge was not named."""
    return Scores(
        metric,
        None,
        notes=(
            f"A judge scores these answers ({judge}): name an OpenAI-compatible server with --judge and run again, "
            "which asks the model nothing.",
        ),
    )


def judged_by(judge: Judge, paper: str) -> str:
    """Return the note on who judged."""
    other = "" if judge.model == paper else f", not by the paper's {paper}: do not compare the two"
    return f"Judged by {judge.model} at {urlsplit(judge.url).hostname}{other}."
