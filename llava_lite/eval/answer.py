"""Answer a file of questions in LLaVA's format, and write LLaVA's lines of answers.

Answers are kept in OUT.jsonl.parts as they come, where a run that was stopped goes on; when all are there they become
OUT.jsonl, and the directory goes.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from llava_lite.data.records.keys import media_keys
from llava_lite.eval.answers import forget, has_answers, merge, to_json
from llava_lite.eval.asking import check_question
from llava_lite.eval.benchmarks.base import Benchmark, Options, Scores
from llava_lite.eval.benchmarks.files import read_lines
from llava_lite.eval.hold import begin, remove_locks
from llava_lite.eval.questions import Question
from llava_lite.eval.ranks import Ranks
from llava_lite.eval.run import ask_share, check_model_flags, describe_run, get_generation
from llava_lite.output_file import ESCAPED


class QuestionFile(Benchmark):
    """A file of questions whose right answers nobody knows."""

    name = "answer"
    title = "answers"
    max_new_tokens = 1024

    def load(self, directory, options):
        """Return the questions of a file; ValueError with the first image that is not in `directory`."""
        file = Path(options.questions)
        questions = [to_question(item, file, directory) for item in read_lines(file, ("question_id", "text"))]
        if not questions:
            raise ValueError(f"{file} has no questions; expected lines of {{question_id, image, text}}.")
        for question in questions:
            check_question(question)
            missing = [image for image in question.images if not os.path.isfile(image)]
            if missing:
                raise FileNotFoundError(
                    f"{file}: the image {missing[0]} of question {question.id!r} is not there. Name the directory of "
                    "the images with --image-folder."
                )
        return questions

    def score(self, questions, answers, options):
        """Return no score."""
        return Scores("", None)


def to_question(item, file: Path, directory: Path) -> Question:
    """Return the question of a line, whose image is a name or a list of names; ValueError for anything else."""
    unread = [key for key in ("images", *media_keys(item)) if item.get(key) and key != "image"]
    if unread:
        raise ValueError(
            f"{file}: question {item['question_id']!r} has the key {unread[0]!r}, which would not be seen: images are "
            "read from 'image', a name or a list of names. Rename the key, or leave it out."
        )
    image = item.get("image")
    names = [] if image is None else image if isinstance(image, list) else [image]
    if not all(isinstance(name, str) for name in names) or not isinstance(item["text"], str):
        raise ValueError(
            f"{file}: question {item['question_id']!r} has the text {item['text']!r} and the image {image!r}; "
            "expected a text, and the name of an image or a list of names."
        )
    return Question(item["question_id"], item["text"], tuple(str(directory / name) for name in names))


def answer_file(flags) -> Path | None:
    """Answer the questions with the flags of `llava-lite answer`; return the file, None where other chunks go on."""
    source, target = Path(flags.questions), Path(flags.out)
    parts = target.with_name(f"{target.name}.parts")
    check_model_flags(flags)
    benchmark, options = QuestionFile(), Options(questions=str(source))
    images = os.path.abspath(flags.image_folder or source.parent)
    questions = benchmark.load(Path(images), options)
    generation = get_generation(benchmark, options, flags)
    ranks = Ranks(flags.num_chunks, flags.chunk_idx, flags.overwrite)
    run = describe_run(benchmark, options, questions, generation, flags, ranks.count)
    # Which images the questions are about.
    run |= {"image_folder": images, "file": hashlib.sha256(source.read_bytes()).hexdigest()[:16]}

    def check_new() -> None:
        if target.exists() and not has_answers(parts) and not flags.overwrite:
            raise FileExistsError(f"{target} is there already. Name another file, or --overwrite to replace it.")

    if not parts.exists():
        # Before the directory is made.
        check_new()
    with ranks, begin(parts, run, ranks, flags.overwrite, check_new):
        ask_share(benchmark, run, generation, questions, parts, flags, ranks)
        if not ranks.scores:
            if not ranks.is_launched:
                print(
                    f"{parts}: chunk {ranks.index} of {ranks.count} is answered; when all are, the same command "
                    f"without --chunk-idx writes {target}."
                )
            return None
        lines = merge(parts, questions, ranks.count)
        draft = target.with_name(f"{target.name}.{os.getpid()}.part")
        draft.write_text("".join(map(to_json, lines)), encoding="utf-8", errors=ESCAPED)
        os.replace(draft, target)
        forget(parts)
        remove_locks(parts)
        with suppress(OSError):
            parts.rmdir()
        print(f"wrote {len(lines):,} answers to {target}")
        return target
