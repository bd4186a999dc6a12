"""Write answers as they come, one JSON object a line as LLaVA does, and go on after a kill at the next question.

A line is `{"question_id", "prompt", "text", "answer_id", "model_id", "metadata": {"index"}}`; index is the position of
the question in the benchmark, since ids repeat in some. Beside the answers stands the run that they belong to.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_lite.eval.questions import Question, chunk_of
from llava_lite.output_file import ESCAPED

RUN_FILE = "run.json"
ANSWERS_FILE = "answers.jsonl"


class AnswerFile:
    """Where the answers of one chunk of a run are written: part_0_of_1.jsonl and the like, in the run's directory."""

    def __init__(self, directory: Path, num_chunks: int = 1, index: int = 0):
        self.path = directory / part_name(num_chunks, index)
        if self.path.is_file():
            cut = self.path.read_bytes().rpartition(b"\n")[2]
            # A kill has cut this line; its question is asked again.
            os.truncate(self.path, self.path.stat().st_size - len(cut))

    def append(self, answered: Mapping[int, tuple[Question, str]], model_id: str) -> None:
        """Write {position: (question, answer)}; they are in the file when this returns."""
        lines = [to_line(position, question, text, model_id) for position, (question, text) in answered.items()]
        with open(self.path, "a", encoding="utf-8", errors=ESCAPED) as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())


def part_name(num_chunks: int, index: int) -> str:
    """Return the name of a chunk's file."""
    return f"part_{index}_of_{num_chunks}.jsonl"


def to_line(position: int, question: Question, text: str, model_id: str) -> str:
    """Return the line of an answer."""
    line = {
        "question_id": question.id,
        **question.more,
        "prompt": question.prompt,
        "text": text,
        "answer_id": uuid.uuid4().hex,
        "model_id": model_id,
        "metadata": {"index": position},
    }
    return to_json(line)


def to_json(line: Mapping[str, Any]) -> str:
    """Return a line of JSON, whose characters stay as they are."""
    return json.dumps(line, ensure_ascii=False) + "\n"


def has_answers(directory: Path) -> bool:
    """Return whether a directory holds an answer."""
    return any(part.stat().st_size for part in directory.glob("part_*_of_*.jsonl"))


def read_answers(directory: Path, questions: Sequence[Question]) -> dict[int, dict[str, Any]]:
    """Return {position: line} of all chunks in a run's directory; a last line that is being written is left out.

    Raises ValueError for a line that is no answer, or one to another question than that at its position.
    """
    answers = {}
    for path in sorted(directory.glob("part_*_of_*.jsonl")):
        complete = path.read_bytes().rpartition(b"\n")[0]
        for number, line in enumerate(complete.split(b"\n") if complete else [], 1):
            try:
                answer = json.loads(line)
                position = answer["metadata"]["index"]
                if not (isinstance(position, int) and isinstance(answer["text"], str)):
                    raise TypeError(f"index {position!r}, text {answer['text']!r}")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number} is no answer of llava-lite eval ({type(error).__name__}: {error}). Move "
                    "the file away, and its questions are asked again."
                ) from error
            if not 0 <= position < len(questions):
                raise ValueError(
                    f"{path}, line {number} answers question {position}, and there are {len(questions)}. It is of "
                    "another run: write elsewhere."
                )
            asked = {"question_id": questions[position].id, "prompt": questions[position].prompt}
            other = next((key for key, value in asked.items() if answer.get(key) != value), None)
            if other is not None:
                raise ValueError(
                    f"{path}, line {number} answers another question: its {other} is {answer.get(other)!r}, and that "
                    f"of question {position} is {asked[other]!r}. It is of another run: write elsewhere."
                )
            answers[position] = answer
    return answers


def claim(directory: Path, run: Mapping[str, Any]) -> None:
    """Write what a run is into its directory, or compare it with the run whose answers are there.

    run: model, template, settings and data, JSON values. Raises ValueError with the first difference.
    """
    path = directory / RUN_FILE
    directory.mkdir(parents=True, exist_ok=True)
    # A run that wrote no answer, such as one with a wrong flag, holds nothing that could be mixed.
    if has_answers(directory):
        compare(directory, run)
        return
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    draft.write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", errors=ESCAPED)
    os.replace(draft, path)


def compare(directory: Path, run: Mapping[str, Any]) -> None:
    """Raise ValueError with the first difference between a run and the one whose answers are in a directory."""
    path = directory / RUN_FILE
    if not path.is_file():
        if has_answers(directory):
            raise ValueError(
                f"{directory} holds answers and no {RUN_FILE} that says of which run. Write elsewhere, or --overwrite "
                "to begin again."
            )
        raise ValueError(f"{directory} has no answers yet; run the chunks first.")
    earlier, run = read_run(path), json.loads(json.dumps(run))
    for key in (*run, *(key for key in earlier if key not in run)):
        if run.get(key) != earlier.get(key) and key not in without_effect(run):
            raise ValueError(
                f"{directory} holds the answers of another run: {key} is {run.get(key)!r} now and was "
                f"{earlier.get(key)!r}. Write elsewhere, or --overwrite to begin again."
            )


def without_effect(run: Mapping[str, Any]) -> set[str]:
    """Return the settings of a run on which its answers do not depend: greedy ones not on what is asked at once."""
    if not run.get("temperature"):
        return {"batch_size", "num_chunks"}
    # One question at a time has a seed of its own.
    return {"num_chunks"} if run.get("batch_size") == 1 else set()


def read_run(path: Path) -> dict[str, Any]:
    """Return the run of a directory's run.json; ValueError with its path for a broken one."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is broken ({error}), so it is not known of which run the answers are. Write elsewhere, or "
            "--overwrite to begin again."
        ) from error
    if not isinstance(run, dict):
        raise ValueError(f"{path} holds a {type(run).__name__}; expected what a run is, {{model, split, ...}}.")
    return run


def forget(directory: Path) -> None:
    """Delete the answers, the run and the results of a directory; other files stay."""
    results = ("results.json", "results.md", "results.png", "answers.jsonl")
    for path in [*(directory / name for name in (RUN_FILE, *results)), *directory.glob("part_*_of_*.jsonl")]:
        path.unlink(missing_ok=True)


def merge(directory: Path, questions: Sequence[Question], num_chunks: int) -> list[dict[str, Any]]:
    """Return all lines in the order of the questions; ValueError for a chunk that is missing or not complete."""
    answers, count = read_answers(directory, questions), len(questions)
    for index in range(num_chunks):
        positions = chunk_of(count, num_chunks, index)
        found = sum(position in answers for position in positions)
        if found < len(positions):
            raise ValueError(
                f"chunk {index} of {num_chunks} has {found} of {len(positions)} answers in {directory}. Run it to its "
                f"end: --num-chunks {num_chunks} --chunk-idx {index}."
            )
    return [answers[position] for position in range(count)]


def write_merged(directory: Path, answers: Sequence[Mapping[str, Any]], scores: Sequence[float | None] | None) -> Path:
    """Write the lines in the order of the questions, each with its score where there is one; return the file.

    LLaVA's own scorers read it; some of them pair questions and answers by their order.
    """
    scores = [None] * len(answers) if scores is None else scores
    lines = [
        {**answer, **({} if score is None else {"score": score})}
        for answer, score in zip(answers, scores, strict=True)
    ]
    path = directory / ANSWERS_FILE
    path.write_text("".join(map(to_json, lines)), encoding="utf-8", errors=ESCAPED)
    return path
