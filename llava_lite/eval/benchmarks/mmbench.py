"""MMBench: a question of several choices, right only if the model finds the answer wherever it stands.

Liu et al. 2023, arXiv 2307.06281: each question is asked once for every rotation of its options. LLaVA's TSV holds the
rotations as lines of their own, whose index is that of the question plus a multiple of a million.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import ClassVar

from llava_lite.eval.benchmarks.base import Benchmark, Need, Scores, score_mean
from llava_lite.eval.benchmarks.files import has_tables, open_table, plain_rows, stored_image
from llava_lite.eval.benchmarks.tsv import decode_image, is_empty, read_table, write_sheet, write_table
from llava_lite.eval.questions import OPTION_LETTER, Question
from llava_lite.eval.scoring.letters import parse_mmbench
from llava_lite.eval.scoring.mmbench import aggregate, circular_scores, get_group

LETTERS = "ABCDE"
# Those that every file and table has.
COLUMNS = ("index", "question", "A", "B", "image")
LINK = "https://download.openmmlab.com/mmclassification/datasets/mmbench/"
# LLaVA's converter drops these columns and puts the answers after the options.
NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")


class MMBench(Benchmark):
    """MMBench in English, as in LLaVA's playground/data/eval/mmbench."""

    name = "mmbench"
    title = "MMBench"
    directory = "mmbench"
    metric = "accuracy under all rotations, %"
    source = "https://github.com/open-compass/MMBench"
    splits = ("dev", "test")
    max_new_tokens = 1024
    files: ClassVar[Mapping[str, str]] = {"dev": "mmbench_dev_20230712.tsv", "test": "mmbench_test_20230712.tsv"}
    config = "en"
    ending = OPTION_LETTER
    needs = (Need(files["dev"], LINK + files["dev"]),)
    test_needs = (Need(files["test"], LINK + files["test"]),)

    def load(self, directory, options):
        """Return the questions of LLaVA's TSV, or of Hugging Face's table."""
        file = directory / (options.questions or self.files[options.split])
        if not file.is_file() and options.questions is None and has_tables(directory):
            rows = open_table(directory, options.split, self.config, COLUMNS)
            return [self.to_question(row, stored_image(rows, i, "image")) for i, row in plain_rows(rows)]
        if not file.is_file():
            source = "what --questions names" if options.questions else LINK + file.name
            raise FileNotFoundError(self.missing_message(directory, [Need(file.name, source)]))
        rows = read_table(file, COLUMNS)
        images = {row["index"]: row.pop("image") for row in rows}
        # In VLMEvalKit's files a rotation holds the index of the line that has its image.
        return [
            self.to_question(row, partial(decode_image, images.get(images[row["index"]], images[row["index"]])))
            for row in rows
        ]

    def to_question(self, row, image) -> Question:
        """Return the question of a line: hint, question and options up to the first empty one."""
        choices = {}
        for letter in LETTERS:
            if is_empty(row.get(letter)):
                break
            choices[letter] = str(row[letter])
        hint = "" if is_empty(row.get("hint")) else f"{row['hint']}\n"
        text = f"{hint}{row['question']}" + "".join(f"\n{letter}. {choice}" for letter, choice in choices.items())
        more = {"round_id": 0, "options": list(choices.values()), "option_char": list(choices)}
        category = "default" if is_empty(row.get("category")) else row["category"]
        truth = {name if name in LETTERS else name.lower(): value for name, value in row.items()}
        truth["index"] = int(row["index"])
        return Question(truth["index"], text + self.ending, (image,), category, truth, text, more)

    def score_one(self, question, answer):
        """Return whether the answer names the right letter; None where the split has no answers."""
        truth = question.truth.get("answer")
        return None if is_empty(truth) else float(read_letter(question, answer) == truth)

    def score(self, questions, answers, options):
        """Return the mean over questions of which every rotation is right, and more."""
        each = [self.score_one(*one) for one in zip(questions, answers, strict=True)]
        if None in each:
            return Scores(
                self.metric,
                None,
                notes=(
                    "The answers of this split are not public: upload the file to https://mmbench.opencompass.org.cn",
                ),
            )
        found = aggregate(
            [question.id for question in questions],
            each,
            [question.category for question in questions],
            [question.truth.get("l2-category") or "default" for question in questions],
        )
        circular = circular_scores([question.id for question in questions], each)
        unread = sum(read_letter(*one) is None for one in zip(questions, answers, strict=True))
        table = {"questions": len(circular), "first rotation alone": 100 * found["vanilla"]}
        table |= {name: 100 * value for kind in ("l2-category", "category") for name, value in found[kind].items()}
        notes = [f"{unread:,} of {len(answers):,} answers name no letter and are wrong; MMBench's server asks GPT."]
        cut = num_incomplete(questions)
        if cut:
            notes.append(f"{cut:,} of {len(circular):,} questions lack rotations, so the score is too high.")
        return replace(score_mean(self.metric, list(circular.values()), table, notes=tuple(notes)), each=each)

    def write(self, out, questions, answers, options):
        """Write the sheet that MMBench's server takes, as TSV and, with openpyxl, as xlsx."""
        rows = []
        for question, answer in zip(questions, answers, strict=True):
            row = question.truth
            first = ("index", "question", *(letter for letter in LETTERS if letter in row))
            last = [name for name in row if name not in (*first, *NOT_UPLOADED)]
            kept = {name: None if is_empty(row[name]) else row[name] for name in (*first, *last)}
            rows.append({name: kept[name] for name in first} | {"prediction": answer} | {n: kept[n] for n in last})
        stem = f"{self.name}_{options.split}_upload"
        return [write_table(out / f"{stem}.tsv", rows), *write_sheet(out / f"{stem}.xlsx", rows)]


class MMBenchCN(MMBench):
    """MMBench in Chinese, as in LLaVA's playground/data/eval/mmbench_cn."""

    name = "mmbench_cn"
    title = "MMBench-CN"
    directory = "mmbench_cn"
    files: ClassVar[Mapping[str, str]] = {"dev": "mmbench_dev_cn_20231003.tsv", "test": "mmbench_test_cn_20231003.tsv"}
    config = "cn"
    ending = "\n请直接回答选项字母。"
    needs = (Need(files["dev"], LINK + files["dev"]),)
    test_needs = (Need(files["test"], LINK + files["test"]),)

    def find(self, data):
        """Return the directory that holds a file: LLaVA's script reads mmbench_cn, and its page says mmbench."""
        places = (super().find(data), data / "mmbench")
        return next((one for one in places for name in self.files.values() if (one / name).is_file()), places[0])


def read_letter(question: Question, answer: str) -> str | None:
    """Return the letter that an answer names, None if that is not clear."""
    return parse_mmbench(answer, dict(zip(question.more["option_char"], question.more["options"], strict=True)))


def num_incomplete(questions) -> int:
    """Return how many questions have fewer rotations than options, as with --limit."""
    counts, num_options = {}, {}
    for question in questions:
        group = get_group(question.id)
        counts[group] = counts.get(group, 0) + 1
        num_options[group] = max(num_options.get(group, 0), len(question.more["options"]))
    return sum(counts[group] < num_options[group] for group in counts)
