"""Read a run from its directory: finished, in progress, stopped, or written by an earlier version."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

from llava_lite.train.monitor.log_lines import METRICS, as_step, json_safe, with_steps
from llava_lite.train.monitor.losses import get_loss_key
from llava_lite.train.monitor.plots import get_expert_lines, series
from llava_lite.train.monitor.report.files import CONFIG, RUN, STATE, RunFiles
from llava_lite.train.monitor.report.samples import read_samples
from llava_lite.train.monitor.report.scores import Score, find_scores
from llava_lite.train.saving import manifest as paper

SKIPPED = {"train": ("skipped_records.jsonl", "skipped_records-rank*.jsonl"), "eval": ("skipped_eval_records.jsonl",)}


@dataclass(frozen=True)
class Run:
    """A run as its files tell it. record, state, config: run.json, trainer_state.json and config.json, {} without one.

    files: what is wrong with them. lines: of metrics.jsonl, or of the log in trainer_state.json (is_log_of_state).
    checkpoints: newest first. skipped: by data set, the lines of the skipped-records logs. scores_faults: sentences on
    results.json that cannot be shown.
    """

    directory: Path
    files: RunFiles
    record: Mapping
    lines: list[dict]
    state: Mapping
    config: Mapping
    settings: Mapping
    checkpoints: list[Path]
    skipped: Mapping[str, list[dict]]
    samples: list[dict]
    scores: list[Score]
    scores_faults: list[str]
    is_log_of_state: bool

    @property
    def tuning(self) -> str | None:
        """What trained, as --tuning names it; None where no file says it."""
        return self.record.get("tuning") or self.settings.get("tuning")

    @property
    def step(self) -> int:
        """The last step that is known."""
        return max([as_step(self.state.get("global_step")) or 0, *(line["step"] for line in self.lines)])

    @property
    def max_steps(self) -> int | None:
        """Steps that the run was to take, None where no file says it."""
        return as_step(self.record.get("max_steps")) or as_step(self.state.get("max_steps")) or None

    @property
    def ranks(self) -> int | None:
        """Ranks of the last start; None for a run without run.json."""
        starts = self.record.get("starts")
        return (as_step(starts[-1].get("ranks")) or None) if starts else None

    @property
    def last_written(self) -> datetime:
        """When the run last wrote its log or its state."""
        paths = [*(self.directory / name for name in (METRICS, STATE, RUN)), *self.checkpoints]
        return datetime.fromtimestamp(max(path.stat().st_mtime for path in paths if path.exists())).astimezone()

    @cached_property
    def status(self) -> str:
        """One of finished, stopped, failed and open: no file says that it ended."""
        if self.record:
            return str(self.record.get("end", {}).get("state", "open"))
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
        return get_loss_key(self.lines)

    @cached_property
    def expert_lines(self) -> list[tuple[int, dict]]:
        """Steps and reports by layer, of the lines that have some."""
        return get_expert_lines(self.lines)


def read_run(directory, score_dirs=()) -> Run:
    """Return the run of a directory. score_dirs: more directories to look for results.json of `llava-lite eval` in.

    Raises FileNotFoundError for a directory that does not exist, ValueError for one that holds no run. What is damaged
    in a run is left out, and its `files` name it.
    """
    directory = Path(directory)
    check_run(directory)
    files, checkpoints = RunFiles(directory), paper.checkpoints_in(directory)
    record, state = files.read_record(), files.read_object(STATE)
    for checkpoint in checkpoints:
        state = state or files.read_object(f"{checkpoint.name}/{STATE}")
    scores, scores_faults = find_scores(directory, score_dirs)
    lines, is_log_of_state = read_log(files, state)
    return Run(
        directory=directory,
        files=files,
        record=record,
        lines=lines,
        is_log_of_state=is_log_of_state,
        state=state,
        config=files.read_object(CONFIG),
        settings=record.get("settings") or get_flags(checkpoints, files),
        checkpoints=checkpoints,
        skipped={name: read_skipped(files, patterns) for name, patterns in SKIPPED.items()},
        samples=read_samples(files, record.get("images", {})),
        scores=scores,
        scores_faults=scores_faults,
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


def read_log(files: RunFiles, state) -> tuple[list[dict], bool]:
    """Return the lines of metrics.jsonl that have their step, else those of the state, and if they are its."""
    lines = json_safe(files.read_lines(METRICS))
    kept = with_steps(lines)
    if len(kept) < len(lines) and METRICS not in files.faults:
        files.faults[METRICS] = f"is damaged ({len(lines) - len(kept):,} of its lines have no step and are left out)"
    log = state.get("log_history")
    return (kept, False) if kept else (with_steps(json_safe(log if isinstance(log, list) else [])), True)


def get_flags(checkpoints: list[Path], files: RunFiles) -> dict:
    """Return the flags that a run without run.json wrote into its newest checkpoint, {} without one."""
    for checkpoint in checkpoints:
        try:
            manifest = paper.read_manifest(checkpoint)
            flags = {**manifest.get("steps", {}), **manifest.get("schedule", {})}
        except paper.BrokenCheckpoint as error:
            files.faults[f"{checkpoint.name}/{error.file}"] = error.reason
            continue
        except (AttributeError, TypeError):
            files.faults[f"{checkpoint.name}/manifest.json"] = "is damaged (its flags are no objects)"
            continue
        return {name: value for name, value in flags.items() if isinstance(value, (bool, int, float, str))}
    return {}


def read_skipped(files: RunFiles, patterns) -> list[dict]:
    """Return the lines of skipped-records logs, a record once."""
    names = [path.name for pattern in patterns for path in sorted(files.directory.glob(pattern))]
    lines = [line for name in names for line in files.read_lines(name)]
    return list(
        {json.dumps([line.get(key) for key in ("path", "position", "place")]): line for line in lines}.values()
    )
