"""Find what `llava-lite eval` has scored of a run: results.json below its directory, or in directories beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

RESULTS = "results.json"
# Beside a run, where the quickstart scores its stages.
BESIDE = "eval"


class Score(NamedTuple):
    """A results.json: its file, its content, and the model that was scored."""

    path: Path
    report: Mapping
    model: str

    @property
    def title(self) -> str:
        """The name of the benchmark, with its split and variant."""
        return str(self.report.get("title") or self.report["benchmark"])


def find_scores(run_dir: Path, more_dirs=()) -> list[Score]:
    """Return the scores of a run, by benchmark and date; outside its directory only those of its own models.

    Raises FileNotFoundError for one of `more_dirs` that does not exist, ValueError for one without scores of this run.
    """
    found = {score.path.resolve(): score for score in read_scores(run_dir)}
    for directory in map(Path, more_dirs):
        if not directory.is_dir():
            raise FileNotFoundError(f"--scores {str(directory)!r} is no directory.")
        here = read_scores(directory)
        mine = [score for score in here if is_of(score.model, run_dir)]
        if not mine:
            models = ", ".join(sorted({score.model for score in here}))
            raise ValueError(
                f"--scores {str(directory)!r} holds no {RESULTS} of {str(run_dir)!r}"
                + (f"; what it holds is of {models}." if models else ".")
            )
        found |= {score.path.resolve(): score for score in mine}
    beside = read_scores(run_dir.resolve().parent / BESIDE)
    found |= {score.path.resolve(): score for score in beside if is_of(score.model, run_dir)}
    return sorted(found.values(), key=lambda score: (str(score.report["benchmark"]), str(score.report.get("date"))))


def read_scores(directory: Path) -> list[Score]:
    """Return the scores below a directory; files of this name that other programs wrote are left out."""
    scores = []
    for path in sorted(directory.rglob(RESULTS)):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(report, dict) and {"benchmark", "score", "metric"} <= report.keys():
            run = report.get("run")
            scores.append(Score(path, report, str(run.get("model", "")) if isinstance(run, dict) else ""))
    return scores


def is_of(model: str, run_dir: Path) -> bool:
    """Tell whether a model is that of a run, or one of its checkpoints; a relative path counts by its last parts."""
    own, parts = run_dir.resolve(), Path(model).parts
    if Path(model).is_absolute():
        return Path(model).resolve() == own or own in Path(model).resolve().parents
    parts = tuple(part for part in parts if part not in (".", ".."))
    parts = parts[:-1] if parts and parts[-1].startswith("checkpoint-") else parts
    return bool(parts) and own.parts[-len(parts) :] == parts
