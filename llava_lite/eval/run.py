"""Score a model on a benchmark: ask its questions, go on after a kill, score, and write the results.

Several processes share the questions: those of `torchrun -m llava_lite.cli eval ...`, or those started one by one with
--num-chunks and --chunk-idx.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_lite.eval.answers import AnswerFile, merge, read_answers, write_merged
from llava_lite.eval.asking import Generation, ask, check_question
from llava_lite.eval.benchmarks import BENCHMARKS, get_benchmark
from llava_lite.eval.benchmarks.base import Benchmark, Options
from llava_lite.eval.hold import begin
from llava_lite.eval.questions import Question, chunk_of
from llava_lite.eval.ranks import Ranks
from llava_lite.eval.results import to_report, to_text, write_report
from llava_lite.hub.source import check_revision
from llava_lite.model.placement import check_device

# Files that hold images of a benchmark, and those that make a model what it is.
TABLES = ("*.parquet", "*/*.parquet", "*/*.arrow", "*.tsv")
WEIGHTS = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt")


def evaluate(flags) -> dict[str, Any] | None:
    """Run a benchmark with the flags of `llava-lite eval`; return its report, None where other chunks go on."""
    benchmark = get_benchmark(flags.benchmark)
    split, variant = benchmark.choose(flags.split, "split"), benchmark.choose(flags.variant, "variant")
    check_flags(benchmark, flags)
    options = Options(split, variant, flags.questions, flags.judge, flags.judge_model)
    with Ranks(flags.num_chunks, flags.chunk_idx, flags.overwrite) as ranks:
        return run_benchmark(benchmark, options, flags, ranks)


def check_flags(benchmark: Benchmark, flags) -> None:
    """Raise ValueError for a flag that would do nothing, and for a device that is not there."""
    check_model_flags(flags)
    given = next((name for name in ("--judge", "--judge-model") if getattr(flags, name[2:].replace("-", "_"))), None)
    if given and not benchmark.is_judged:
        judged = ", ".join(name for name, kind in BENCHMARKS.items() if kind.is_judged)
        raise ValueError(f"{given}: {benchmark.name} is scored without a judge. Leave it out; judged are {judged}.")
    if given == "--judge-model":
        raise ValueError("--judge-model is asked for at a server; name that too: --judge http://HOST:PORT.")
    if flags.questions and not benchmark.takes_questions:
        raise ValueError(f"--questions {flags.questions}: {benchmark.name} reads its own files alone. Leave it out.")


def check_model_flags(flags) -> None:
    """Raise ValueError for a device that is not there, and for a revision of a directory."""
    check_revision(flags.model, flags.revision)
    check_device(flags.device)


def run_benchmark(benchmark: Benchmark, options: Options, flags, ranks: Ranks) -> dict[str, Any] | None:
    """Ask what is left of a chunk, and score where all is answered; return the report, None where others go on."""
    directory = benchmark.find(Path(flags.data))
    questions = load_questions(benchmark, directory, options)[: flags.limit]
    generation = get_generation(benchmark, options, flags)
    run = describe_run(benchmark, options, questions, generation, flags, ranks.count)
    if any(callable(image) for question in questions for image in question.images):
        # Images of tables have no files of their own.
        tables = [path for pattern in TABLES for path in directory.glob(pattern)]
        run |= {"data": str(directory.resolve()), "tables": files_digest(directory, tables)}
    out = Path(flags.out) if flags.out else default_out(directory, benchmark, options, flags)
    options = options._replace(out=str(out))
    with begin(out, run, ranks, flags.overwrite):
        ask_share(benchmark, run, generation, questions, out, flags, ranks)
        if ranks.scores:
            return score_run(benchmark, options, run, questions, out, ranks)
    if not ranks.is_launched:
        print(f"{out}: chunk {ranks.index} of {ranks.count} is answered. Score with --num-chunks {ranks.count}.")
    return None


def score_run(benchmark, options, run, questions: Sequence[Question], out: Path, ranks: Ranks) -> dict[str, Any]:
    """Score the answers in a run's directory, write and print the report, and return it."""
    lines = merge(out, questions, ranks.count)
    answers = [line["text"] for line in lines]
    # Before the score, for which a judge may not be reached.
    written = [write_merged(out, lines, None), *benchmark.write(out, questions, answers, options)]
    scores = benchmark.score(questions, answers, options)
    write_merged(out, lines, scores.each)
    report = to_report(benchmark, scores, run, len(questions))
    written += write_report(out, report)
    print(to_text(report) + "\n" + "\n".join(f"wrote {path}" for path in written))
    return report


def ask_share(benchmark, run, generation, questions: Sequence[Question], out: Path, flags, ranks: Ranks) -> None:
    """Ask what this process is to ask; return when all ranks have."""
    if ranks.asks:
        ask_chunk(benchmark, run, generation, questions, out, flags, ranks)
    ranks.wait()


def load_questions(benchmark: Benchmark, directory: Path, options: Options) -> list[Question]:
    """Return all questions; ValueError where there are none, and for a file without a key that is read."""
    try:
        questions = benchmark.load(directory, options)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the files of {benchmark.title} in {directory} are not in the format of {benchmark.source}: "
            f"{type(error).__name__}: {error}."
        ) from error
    if not questions:
        raise ValueError(f"{directory} has no questions of {benchmark.title}.")
    for question in questions:
        check_question(question)
    return questions


def ask_chunk(
    benchmark, run, generation: Generation, questions: Sequence[Question], out: Path, flags, ranks: Ranks
) -> None:
    """Ask the questions of a chunk that have no answer yet."""
    from tqdm import tqdm

    file = AnswerFile(out, ranks.count, ranks.index)
    known = {position: line["text"] for position, line in read_answers(out, questions).items()}
    positions = list(chunk_of(len(questions), ranks.count, ranks.index))
    left = [position for position in positions if position not in known]
    if not left:
        return
    check_images([questions[position] for position in left])
    model, processor = open_model(flags, ranks, any(question.images for question in questions))
    if generation.image_aspect_ratio and processor.image_aspect_ratio != "anyres":
        processor.image_aspect_ratio = generation.image_aspect_ratio
    running = Running(benchmark, {i: (questions[i], known[i]) for i in positions if i in known})
    hidden = ranks.is_launched and not ranks.is_first
    with tqdm(total=len(positions), initial=len(positions) - len(left), desc=benchmark.title, disable=hidden) as bar:

        def keep(answers: dict[int, str]) -> None:
            answered = {position: (questions[position], text) for position, text in answers.items()}
            file.append(answered, run["model"])
            running.add(answered)
            bar.set_postfix_str(running.text)
            bar.update(len(answers))

        ask(model, processor, questions, positions, generation, flags.batch_size, keep, known)


def get_generation(benchmark: Benchmark, options: Options, flags) -> Generation:
    """Return how the answers are generated: as in LLaVA's scripts, as the benchmark says, and as the flags say."""
    fields = {"max_new_tokens": benchmark.max_new_tokens, **benchmark.generation(options)}
    chosen = {name: getattr(flags, name) for name in ("max_new_tokens", "temperature", "num_beams")}
    fields |= {name: value for name, value in chosen.items() if value is not None}
    temperature = fields.get("temperature", 0.0)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"--temperature {temperature}: 0 for greedy decoding, or a number above it.")
    if flags.top_p is not None:
        if not 0 < flags.top_p <= 1 or not temperature:
            raise ValueError(f"--top-p {flags.top_p}: a number above 0, at most 1, and with a --temperature above 0.")
        fields["more"] = {**fields.get("more", {}), "top_p": flags.top_p}
    return Generation(flags.conv_mode, **fields)


def check_images(questions: Sequence[Question]) -> None:
    """Raise FileNotFoundError with the number of missing images: before the model, not in the middle of a run."""
    paths = {image for question in questions for image in question.images if isinstance(image, str)}
    missing = sorted(path for path in paths if not os.path.isfile(path))
    if missing:
        raise FileNotFoundError(
            f"{len(missing):,} of {len(paths):,} images are not there, the first is {missing[0]}. Get the complete "
            "images of the benchmark."
        )


class Running:
    """The mean score of the answers so far, for the progress bar."""

    def __init__(self, benchmark: Benchmark, answered):
        self.benchmark, self.sum, self.count = benchmark, 0.0, 0
        self.add(answered)

    def add(self, answered) -> None:
        """Add {position: (question, answer)}."""
        scores = [self.benchmark.score_one(question, text) for question, text in answered.values()]
        known = [score for score in scores if score is not None]
        self.sum, self.count = self.sum + sum(known), self.count + len(known)

    @property
    def text(self) -> str:
        """Return the score in percent, empty where a single answer has none."""
        return f"{100 * self.sum / self.count:.1f}%" if self.count else ""


def open_model(flags, ranks: Ranks, needs_images: bool):
    """Return model and processor on the device of this rank; ValueError for a text-only model on images."""
    import torch

    from llava_lite.inference import load

    device = flags.device
    if (device is None or (device == "cuda" and ranks.is_launched)) and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    more = {name: True for name in ("load_8bit", "load_4bit") if getattr(flags, name)}
    model, processor = load(flags.model, device, model_base=flags.model_base, revision=flags.revision, **more)
    if needs_images and processor.image_processor is None:
        raise ValueError(f"{flags.model!r} has no vision tower and the benchmark has images; name a LLaVA model.")
    # Before the first question: an unknown template is named with those that are known.
    processor.template(flags.conv_mode)
    return model, processor


def describe_run(
    benchmark: Benchmark,
    options: Options,
    questions: Sequence[Question],
    generation: Generation,
    flags,
    num_chunks: int,
) -> dict[str, Any]:
    """Return what the answers depend on, as JSON values: model, prompts, settings and the questions."""
    asked = hashlib.sha256()
    for question in questions:
        images = "\0".join(map(image_facts, question.images))
        asked.update(f"{question.id}\0{question.text}\0{images}\n".encode("utf-8", "surrogatepass"))
    return {
        "benchmark": benchmark.name,
        "split": options.split,
        "variant": options.variant,
        "model": place_of(flags.model),
        "model_base": place_of(flags.model_base),
        "base_weights": None if flags.model_base is None else weights_digest(flags.model_base),
        "revision": flags.revision,
        "weights": weights_digest(flags.model),
        "quantised": "8 bit" if flags.load_8bit else "4 bit" if flags.load_4bit else None,
        **asdict(generation),
        "batch_size": flags.batch_size,
        "num_chunks": num_chunks,
        "num_questions": len(questions),
        "questions": asked.hexdigest()[:16],
    }


def image_facts(image) -> str:
    """Return name, size and time of an image's file, a digest of its bytes; "" for one that is read from a table."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    if not isinstance(image, str) or not os.path.isfile(image):
        return ""
    found = os.stat(image)
    return f"{os.path.basename(image)} {found.st_size} {found.st_mtime_ns}"


def weights_digest(model: str) -> str | None:
    """Return a digest of names, sizes and times of a model's file, or files in a directory; None for a hub id."""
    directory = Path(model)
    if directory.is_file():
        return files_digest(directory.parent, [directory])
    if not directory.is_dir():
        return None
    return files_digest(directory, [path for pattern in WEIGHTS for path in directory.glob(pattern)])


def files_digest(directory: Path, files: Iterable[Path]) -> str:
    """Return a digest of the paths of files below a directory, of their sizes and times."""
    stats = [(path.relative_to(directory).as_posix(), path.stat()) for path in sorted(set(files))]
    facts = [f"{name} {found.st_size} {found.st_mtime_ns}" for name, found in stats]
    return hashlib.sha256("\n".join(facts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def place_of(model: str | None) -> str | None:
    """Return the full path of a file or directory, which a person may write in several ways; a hub id as it is."""
    return os.path.abspath(model) if model is not None and os.path.exists(model) else model


def default_out(directory: Path, benchmark: Benchmark, options: Options, flags) -> Path:
    """Return answers/MODEL/BENCHMARK in the benchmark's directory, with what is not the default in its name."""
    name = benchmark.name
    for chosen, known in ((options.split, benchmark.splits), (options.variant, benchmark.variants)):
        name += f"_{chosen}" if chosen in known[1:] else ""
    if options.questions:
        name += f"_{Path(options.questions).stem}"
    if flags.limit is not None:
        name += f"_first_{flags.limit}"
    return directory / "answers" / Path(place_of(flags.model)).name / name


def list_benchmarks() -> str:
    """Return the table of `llava-lite eval list`."""
    rows = [("name", "benchmark", "score", "directory", "splits, variants")]
    for name, kind in BENCHMARKS.items():
        more = ", ".join((*kind.splits, *kind.variants))
        rows.append((name, kind.title, kind.metric, kind.directory, more))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    )
