"""Find what `llava-lite eval` has scored of a run: results.json below its directory, or in directories beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from llava_lite.train.monitor.log_lines import read_object

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


def find_scores(run_dir: Path, more_dirs=()) -> tuple[list[Score], list[str]]:
    """Return the scores of a run, by benchmark and date, and a sentence for each results.json that is damaged.

    Outside its directory only those of its own models count; of a damaged one nobody knows whose it is. Raises
    FileNotFoundError for one of `more_dirs` that does not exist, ValueError for one without scores of this run.
    """
    scores, faults = read_scores(run_dir)
    found = {score.path.resolve(): score for score in scores}
    for directory in map(Path, more_dirs):
        if not directory.is_dir():
            raise FileNotFoundError(f"--scores {str(directory)!r} is no directory.")
        here, damaged = read_scores(directory)
        faults += damaged
        mine = [score for score in here if is_of(score.model, run_dir)]
        if not mine and not damaged:
            models = ", ".join(sorted({score.model for score in here}))
            raise ValueError(
                f"--scores {str(directory)!r} holds no {RESULTS} of {str(run_dir)!r}"
                + (f"; what it holds is of {models}." if models else ".")
            )
        found |= {score.path.resolve(): score for score in mine}
    beside, damaged = read_scores(run_dir.resolve().parent / BESIDE)
    found |= {score.path.resolve(): score for score in beside if is_of(score.model, run_dir)}
    ordered = sorted(found.values(), key=lambda one: (str(one.report["benchmark"]), str(one.report.get("date"))))
    return ordered, list(dict.fromkeys([*faults, *damaged]))


def read_scores(directory: Path) -> tuple[list[Score], list[str]]:
    """Return the scores below a directory, and a sentence for each file that is damaged or cannot be read.

    Files of this name that other programs wrote are left out: they are no objects with a "benchmark".
    """
    scores, faults = [], []
    for path in sorted(directory.rglob(RESULTS)):
        report, fault, is_missing = read_object(path)
        lacking = [f'"{key}"' for key in ("metric", "score") if key not in report]
        if fault:
            faults += [] if is_missing else [f"{path} {fault}."]
        elif "benchmark" in report and lacking:
            faults.append(f"{path} is damaged (it has no {' and no '.join(lacking)}).")
        elif "benchmark" in report:
            run = report.get("run")
            scores.append(Score(path, report, str(run.get("model", "")) if isinstance(run, dict) else ""))
    return scores, faults


def is_of(model: str, run_dir: Path) -> bool:
    """Tell whether a model is that of a run, or one of its checkpoints; a relative path counts by its last parts."""
    own, parts = run_dir.resolve(), Path(model).parts
    if Path(model).is_absolute():
        return Path(model).resolve() == own or own in Path(model).resolve().parents
    parts = tuple(part for part in parts if part not in (".", ".."))
    parts = parts[:-1] if parts and parts[-1].startswith("checkpoint-") else parts
    return bool(parts) and own.parts[-len(parts) :] == parts
