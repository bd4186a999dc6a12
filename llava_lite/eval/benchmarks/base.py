"""What a benchmark is: it loads its questions, scores the answers, and writes them for those who score elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from llava_lite.eval.benchmarks.files import has_tables
from llava_lite.eval.questions import Question
from llava_lite.eval.scoring.interval import mean_interval
from llava_lite.eval.scoring.means import mean, means_by

# Where LLaVA's question files are; its docs/Evaluation.md says so.
EVAL_ZIP = "LLaVA's eval.zip, https://drive.google.com/file/d/1atZSBBrAX54yYpxtVVW33zFvcnaHeFPy/view"


class Need(NamedTuple):
    """A file or directory that a benchmark reads: its path below the benchmark's directory, and where to get it."""

    path: str
    source: str


@dataclass(frozen=True)
class Scores:
    """The result of a benchmark.

    main: the figure that papers report, named by `metric`; None where answers are scored elsewhere or by a judge that
    was not asked. interval: its 95% interval. table: all figures in the order in which they are shown. each: the score
    of every question, in their order, where there is one. notes: sentences for the reader.
    """

    metric: str
    main: float | None
    interval: tuple[float, float] | None = None
    table: Mapping[str, float | int | str] = field(default_factory=dict)
    each: Sequence[float | None] | None = None
    notes: tuple[str, ...] = ()


class Options(NamedTuple):
    """What a person chooses of a benchmark.

    split, variant: names, or None where there is no choice. questions: another question file, below the benchmark's
    directory. judge, judge_model: address of an OpenAI-compatible server, and the model that it is asked for. out:
    directory of the answers, where the reviews of a judge are kept.
    """

    split: str | None = None
    variant: str | None = None
    questions: str | None = None
    judge: str | None = None
    judge_model: str | None = None
    out: str | None = None


class Benchmark(ABC):
    """One benchmark; a subclass is a line in BENCHMARKS.

    title: as papers write it. directory: below the root of all benchmarks, LLaVA's playground/data/eval. splits,
    variants: known names, the default first. max_new_tokens: of LLaVA's scripts. needs: files of its first split.
    test_needs: files of those that others score. is_judged: whether a model scores its answers. takes_questions:
    whether it reads another question file.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    directory: ClassVar[str]
    metric: ClassVar[str] = "accuracy, %"
    source: ClassVar[str] = ""
    splits: ClassVar[tuple[str, ...]] = ()
    variants: ClassVar[tuple[str, ...]] = ()
    max_new_tokens: ClassVar[int] = 128
    needs: ClassVar[tuple[Need, ...]] = ()
    test_needs: ClassVar[tuple[Need, ...]] = ()
    is_judged: ClassVar[bool] = False
    takes_questions: ClassVar[bool] = True

    @abstractmethod
    def load(self, directory: Path, options: Options) -> list[Question]:
        """Return the questions in their order; ValueError, or FileNotFoundError with what is needed."""

    def generation(self, options: Options) -> Mapping[str, Any]:
        """Return the fields of `asking.Generation` in which the benchmark differs from greedy decoding."""
        return {}

    @abstractmethod
    def score(self, questions: Sequence[Question], answers: Sequence[str], options: Options) -> Scores:
        """Return the scores of the answers, in the order of the questions."""

    def score_one(self, question: Question, answer: str) -> float | None:
        """Return the score of one answer, 0 to 1, for the running score; None where one alone has none."""
        return None

    def write(self, out: Path, questions: Sequence[Question], answers: Sequence[str], options: Options) -> list[Path]:
        """Write what a server or another scorer reads into `out`, and return the files."""
        return []

    def find(self, data: Path) -> Path:
        """Return the benchmark's directory: `data`/directory, or `data` itself where its files or tables are."""
        inner = data / self.directory
        own = any((data / need.path).exists() for need in (*self.needs, *self.test_needs))
        return data if not inner.is_dir() and (own or has_tables(data)) else inner

    def choose(self, given: str | None, kind: str) -> str | None:
        """Return the chosen split or variant, the first by default; ValueError with the known ones for another."""
        known = self.splits if kind == "split" else self.variants
        if given is None:
            return known[0] if known else None
        if given not in known:
            has = ", ".join(known) if known else f"it has no {kind}s"
            raise ValueError(f"--{kind} {given}: unknown for {self.name}; known: {has}.")
        return given

    def check(self, directory: Path, needs: Sequence[Need] | None = None) -> None:
        """Raise FileNotFoundError with the list of all that is missing. needs: `self.needs` by default."""
        missing = [need for need in (self.needs if needs is None else needs) if not (directory / need.path).exists()]
        if missing:
            raise FileNotFoundError(self.missing_message(directory, missing))

    def has_tables_alone(self, directory: Path, options: Options, needs: Sequence[Need] | None = None) -> bool:
        """Return whether a directory holds tables of Hugging Face and none of the benchmark's own files.

        Raises ValueError for another question file, which has no place beside tables.
        """
        own = any((directory / need.path).exists() for need in (self.needs if needs is None else needs))
        found = not own and has_tables(directory)
        if found and options.questions:
            raise ValueError(
                f"--questions {options.questions}: {directory} holds tables, which are asked as they are. Leave it "
                "out, or name a directory with the benchmark's own files."
            )
        return found

    def missing_message(self, directory: Path, missing: Sequence[Need]) -> str:
        """Return what is missing, where to get it and where it goes."""
        lines = [f"  {directory / need.path}    from {need.source}" for need in missing]
        return (
            f"{self.title} needs files that are not in {directory}:\n" + "\n".join(lines) + "\n"
            "Put them there, or name another directory with --data. Tables of Hugging Face (parquet) are read too."
        )


def score_mean(
    metric: str,
    each: Sequence[float],
    table: Mapping[str, float | int | str] | None = None,
    groups: Sequence[Hashable] | None = None,
    notes: tuple[str, ...] = (),
) -> Scores:
    """Return the mean of the scores of all questions, 0 to 1, in percent with its interval.

    groups: equal for questions about one image, which are drawn together for the interval.
    """
    if groups is not None and len(set(groups)) == len(groups):
        groups = None
    low, high = mean_interval(each, groups)
    return Scores(metric, 100 * mean(each), (100 * low, 100 * high), table or {}, each, notes)


def percents(each: Sequence[float], kinds: Sequence[Hashable]) -> dict[str, float]:
    """Return {kind: mean of its scores in percent}, in the order in which the kinds appear."""
    return {str(kind): 100 * value for kind, value in means_by(each, kinds).items()}


def image_groups(questions: Sequence[Question]) -> list[Hashable]:
    """Return a label for each question, equal for questions about the same images."""
    return [question.images for question in questions]
