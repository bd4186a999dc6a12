"""Keep what a resumed run must know: the date of its first start, and the records that it leaves out."""

import json
import logging
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from llava_lite.conversation.chat_template import today
from llava_lite.distributed.ranks import everyone
from llava_lite.train.inputs.skipped import SkipLog
from llava_lite.train.monitor.log_lines import read_metrics

logger = logging.getLogger(__name__)

FACTS = "run_facts.json"
# The skipped-records logs by data set; for shards there is one a rank.
LOGS = {"train": "skipped_records.jsonl", "eval": "skipped_eval_records.jsonl"}
LOGS_OF_RANKS = "skipped_records-rank*.jsonl"


@dataclass
class RunFacts:
    """Facts of a run that are the same on every rank.

    moment: of the run's first start, on rank 0; chat templates write its date. step, epoch: of the checkpoint that is
    resumed. before: by data set, the lines of the records left out at the first "start" and "later"; empty in a new
    run. logs: the skipped-records logs of the data sets, once they are open.
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


def load_run_facts(checkpoint: str | bool | None = None) -> RunFacts:
    """Return the facts of a new run, or of one that is resumed from a checkpoint; all ranks must call it.

    A checkpoint that was saved before there were such facts gets today's date, and leaves out what a check finds now.
    """
    read = everyone(_read(checkpoint) if checkpoint else {"moment": today().isoformat()})
    first = read[0]
    if checkpoint and first["moment"] is None:
        logger.info("%s does not hold the date of its first start; chat templates write today's.", checkpoint)
    before = {}
    for name, kept in first.get("left_out", {}).items():
        # The logs may lie on several nodes.
        later = [line for answers in read for line in answers["left_out"].get(name, {}).get("later", ())]
        before[name] = {"start": kept["start"], "later": _earliest(later)}
    moment = datetime.fromisoformat(first["moment"]) if first["moment"] else everyone(today())[0]
    return RunFacts(moment, first.get("step", 0), first.get("epoch", 0), before)


def _read(checkpoint: str) -> dict:
    """Return what this rank reads from a checkpoint and from the logs beside it."""
    directory = Path(checkpoint)
    state = _json(directory / "trainer_state.json")
    step, epoch = int(state.get("global_step") or 0), int(state.get("epoch") or 0)
    facts = _json(directory / FACTS)
    left_out = facts.get("left_out", {})
    for name, kept in left_out.items():
        logs = [
            directory.parent / LOGS[name],
            *(sorted(directory.parent.glob(LOGS_OF_RANKS)) if name == "train" else ()),
        ]
        # Found after the checkpoint: the run knew it from there on, and so does the resumed one.
        newer = [
            line for path in logs for line in read_metrics(path) if line.get("step", -1) > step and "place" in line
        ]
        kept["later"] = [*kept["later"], *newer]
    return {"moment": facts.get("moment"), "step": step, "epoch": epoch, "left_out": left_out}


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _earliest(lines: list[dict]) -> list[dict]:
    """Return one line a position, the earliest one, in the order in which they were found."""
    found = {}
    for line in lines:
        known = found.setdefault(line["place"], line)
        if line["since"] < known["since"]:
            found[line["place"]] = line
    return sorted(found.values(), key=lambda line: (line["step"], line["place"]))
