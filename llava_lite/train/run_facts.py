"""Keep what a run has to know again when it goes on: its date, and the records that it leaves out."""

import json
import logging
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from llava_lite.chat_template import today
from llava_lite.train.ranks import everyone
from llava_lite.train.skipped import SkipLog

logger = logging.getLogger(__name__)

FACTS = "run_facts.json"
# The logs of skipped records by data set; those of shards are one a rank.
LOGS = {"train": "skipped_records.jsonl", "eval": "skipped_eval_records.jsonl"}
LOGS_OF_RANKS = "skipped_records-rank*.jsonl"


@dataclass
class RunFacts:
    """What is the same on every rank and stays so.

    moment: the date that chat templates write is that of the run's first start, on rank 0. step, epoch: where the
    checkpoint stands from which it goes on. before: by data set, the lines of what was left out at the first "start"
    and "later"; empty at a first start. logs: the data sets' logs, once they are open.
    """

    moment: datetime
    step: int = 0
    epoch: int = 0
    before: dict[str, dict] = field(default_factory=dict)
    logs: dict[str, SkipLog] = field(default_factory=dict)

    def state(self) -> dict:
        """Return what a checkpoint keeps."""
        left_out = {name: log.state() for name, log in self.logs.items()}
        return {"moment": self.moment.isoformat(), "left_out": left_out}


def facts_of_run(checkpoint: str | bool | None = None) -> RunFacts:
    """Return the facts of a run that begins, or goes on from a checkpoint; all ranks must call it.

    One that was saved before there were such facts has the date of today and leaves out what a check finds now.
    """
    read = everyone(_read(checkpoint) if checkpoint else {"moment": today().isoformat()})
    first = read[0]
    if checkpoint and first["moment"] is None:
        logger.info("%s does not say on which day its run began; chat templates write today's date.", checkpoint)
    before = {}
    for name, kept in first.get("left_out", {}).items():
        # The logs may lie on several nodes.
        later = [line for answers in read for line in answers["left_out"].get(name, {}).get("later", ())]
        before[name] = {"start": kept["start"], "later": _earliest(later)}
    moment = datetime.fromisoformat(first["moment"]) if first["moment"] else everyone(today())[0]
    return RunFacts(moment, first.get("step", 0), first.get("epoch", 0), before)


def _read(checkpoint: str) -> dict:
    """Return what this rank reads of a checkpoint and of the logs beside it."""
    folder = Path(checkpoint)
    state = _json(folder / "trainer_state.json")
    step, epoch = int(state.get("global_step") or 0), int(state.get("epoch") or 0)
    facts = _json(folder / FACTS)
    left_out = facts.get("left_out", {})
    for name, kept in left_out.items():
        logs = [folder.parent / LOGS[name], *(sorted(folder.parent.glob(LOGS_OF_RANKS)) if name == "train" else ())]
        # What was found after the checkpoint: the run knew it from there on, and so does the one that goes on.
        newer = [line for path in logs for line in lines_of(path) if line.get("step", -1) > step and "place" in line]
        kept["later"] = [*kept["later"], *newer]
    return {"moment": facts.get("moment"), "step": step, "epoch": epoch, "left_out": left_out}


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def lines_of(path: Path) -> list[dict]:
    """Return the lines of a log of skipped records; one that a crash cut short ends the list."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _earliest(lines: list[dict]) -> list[dict]:
    """Return one line a place, that with the earliest time, in the order in which they were found."""
    found = {}
    for line in lines:
        known = found.setdefault(line["place"], line)
        if line["since"] < known["since"]:
            found[line["place"]] = line
    return sorted(found.values(), key=lambda line: (line["step"], line["place"]))
