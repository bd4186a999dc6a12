"""Read a run from its directory: finished, in progress, stopped, or written by an earlier version."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

from llava_lite.train.monitor.plots import series
from llava_lite.train.monitor.report.record import RUN, read_record
from llava_lite.train.monitor.report.samples import read_samples
from llava_lite.train.monitor.report.scores import Score, find_scores
from llava_lite.train.monitor.run_log import METRICS, json_safe, read_metrics
from llava_lite.train.monitor.summary import STATE
from llava_lite.train.saving import manifest as paper

# What the fields of run.json are; another file of this name is answered in one sentence.
TYPES = {"data": dict, "experts": dict, "parameters": dict, "settings": dict, "versions": dict, "starts": list}
TYPES |= {"end": dict, "images": dict}
SKIPPED = {"train": ("skipped_records.jsonl", "skipped_records-rank*.jsonl"), "eval": ("skipped_eval_records.jsonl",)}


@dataclass(frozen=True)
class Run:
    """A run as its files tell it. record, state, config: run.json, trainer_state.json and config.json, {} without one.

    lines: of metrics.jsonl, or of the log in trainer_state.json. checkpoints: newest first. skipped: by data set, the
    lines of the skipped-records logs.
    """

    directory: Path
    record: Mapping
    lines: list[dict]
    state: Mapping
    config: Mapping
    settings: Mapping
    checkpoints: list[Path]
    skipped: Mapping[str, list[dict]]
    samples: list[dict]
    scores: list[Score]

    @property
    def tuning(self) -> str | None:
        """What trained, as --tuning names it; None where no file says it."""
        return self.record.get("tuning") or self.settings.get("tuning")

    @property
    def step(self) -> int:
        """The last step that is known."""
        return int(max([self.state.get("global_step") or 0, *(line["step"] for line in self.lines)]))

    @property
    def max_steps(self) -> int | None:
        """Steps that the run was to take, None where no file says it."""
        return self.record.get("max_steps") or self.state.get("max_steps") or None

    @property
    def ranks(self) -> int | None:
        """Ranks of the last start; None for a run without run.json."""
        starts = self.record.get("starts")
        return starts[-1].get("ranks") if starts else None

    @property
    def last_written(self) -> datetime:
        """When the run last wrote its log or its state."""
        paths = [*(self.directory / name for name in (METRICS, STATE, RUN)), *self.checkpoints]
        return datetime.fromtimestamp(max(path.stat().st_mtime for path in paths if path.exists())).astimezone()

    @cached_property
    def status(self) -> str:
        """One of finished, stopped, failed and open: no file says that it ended."""
        if self.record:
            return self.record.get("end", {}).get("state", "open")
        # Before run.json was written, the state of the last step stood beside the model.
        is_done = (self.directory / STATE).is_file() and self.max_steps and self.step >= self.max_steps
        return "finished" if is_done else "open"

    def series(self, key: str) -> tuple[list, list]:
        """Return the steps and the numbers of a key of the log."""
        return series(self.lines, key)

    def last(self, key: str):
        """Return the last number of a key of the log, None without one."""
        values = self.series(key)[1]
        return values[-1] if values else None

    @cached_property
    def loss_key(self) -> str:
        """The key of the cross-entropy: with experts it is logged beside the sum of both losses."""
        return "lm_loss" if self.series("lm_loss")[1] else "loss"

    @cached_property
    def expert_lines(self) -> list[tuple[int, dict]]:
        """Steps and reports by layer, of the lines that have some."""
        found = [(line["step"], line.get("experts")) for line in self.lines]
        return [(step, report) for step, report in found if isinstance(report, dict) and report]


def read_run(directory, score_dirs=()) -> Run:
    """Return the run of a directory. score_dirs: more directories to look for results.json of `llava-lite eval` in.

    Raises FileNotFoundError for a directory that does not exist, ValueError for one that holds no run or a run.json
    that is none.
    """
    directory = Path(directory)
    check_run(directory)
    record = read_record(directory / RUN)
    for name, kind in TYPES.items():
        if not isinstance(record.get(name, kind()), kind):
            found, wanted = type(record[name]).__name__, kind.__name__
            raise ValueError(f"{directory / RUN}: {name!r} is a {found}, expected a {wanted}; it is no run of ours.")
    checkpoints = paper.checkpoints_in(directory)
    state = read_record(directory / STATE) or next(filter(None, (read_record(one / STATE) for one in checkpoints)), {})
    lines = with_steps(read_metrics(directory / METRICS)) or with_steps(json_safe(state.get("log_history") or []))
    return Run(
        directory=directory,
        record=record,
        lines=lines,
        state=state,
        config=read_record(directory / "config.json"),
        settings=record.get("settings") or get_flags(checkpoints),
        checkpoints=checkpoints,
        skipped={name: read_skipped(directory, patterns) for name, patterns in SKIPPED.items()},
        samples=read_samples(directory, record.get("images", {})),
        scores=find_scores(directory, score_dirs),
    )


def is_run(directory: Path) -> bool:
    """Tell whether a directory holds a run."""
    return any((directory / name).is_file() for name in (METRICS, RUN, STATE)) or bool(paper.checkpoints_in(directory))


def check_run(directory: Path) -> None:
    """Raise FileNotFoundError or ValueError for what is no directory of a run, with the runs that are below it."""
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise FileNotFoundError(f"{str(directory)!r} {what}; name the --output_dir of a run of `llava-lite train`.")
    if not is_run(directory):
        below = [path.name for path in sorted(directory.iterdir()) if path.is_dir() and is_run(path)]
        advice = f"Runs below it: {', '.join(below)}." if below else "Name the --output_dir of `llava-lite train`."
        raise ValueError(f"{str(directory)!r} holds no run: no {METRICS}, {RUN}, {STATE} or checkpoint-N. {advice}")


def with_steps(lines) -> list[dict]:
    """Return the lines of a log that say at which step they were written."""
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


def get_flags(checkpoints: list[Path]) -> dict:
    """Return the flags that a run without run.json wrote into its newest checkpoint, {} without one."""
    for checkpoint in checkpoints:
        try:
            manifest = paper.read_manifest(checkpoint)
        except paper.BrokenCheckpoint:
            continue
        flags = {**manifest.get("steps", {}), **manifest.get("schedule", {})}
        return {name: value for name, value in flags.items() if isinstance(value, (bool, int, float, str))}
    return {}


def read_skipped(directory: Path, patterns) -> list[dict]:
    """Return the lines of skipped-records logs, a record once."""
    paths = [path for pattern in patterns for path in sorted(directory.glob(pattern))]
    lines = [line for path in paths for line in read_metrics(path) if isinstance(line, dict)]
    return list(
        {json.dumps([line.get(key) for key in ("path", "position", "place")]): line for line in lines}.values()
    )
