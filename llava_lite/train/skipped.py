"""Turn what workers could not read into a decision of all ranks: a line of the log of skipped records, or an error.

Which records are left out, and what stands in their place, is told in data/left_out.py.
"""

import json
import logging
import os
from pathlib import Path

from llava_lite.data.check import BadRecord, apply_policy
from llava_lite.data.check_report import number
from llava_lite.data.left_out import LeftOut
from llava_lite.data.scan import DataError
from llava_lite.train.ranks import everyone, raise_together

logger = logging.getLogger(__name__)

ADVICE = "Mend it, or leave such records out with --bad_record skip."


def bad_of(line: dict) -> BadRecord:
    """Return the record that a line of the log or of a checkpoint tells of."""
    return BadRecord(*(line[field] for field in BadRecord._fields))


class SkipLog:
    """The records that a run leaves out of one of its data sets; on every rank the same, on the first a file too.

    left_out: what the workers look at. bad_record, max_bad_share: the flags. path: of the log, None to write none.
    num_records: of the data set, all of them; None for shards. start: lines of what the check before the first step
    found; later: lines of what could not be read since, with "step" and "since".
    """

    def __init__(self, left_out: LeftOut, bad_record: str, max_bad_share: float, path=None, num_records=None):
        self.left_out, self.bad_record, self.max_bad_share = left_out, bad_record, max_bad_share
        self.path, self.num_records = path, num_records
        self.start, self.later, self.places = [], [], set()

    def begin(self, start: list[dict], later: list[dict]) -> None:
        """Take up what a run that goes on has left out so far, and write the log anew."""
        self.start = list(start)
        self._add(later)
        if self.path is not None:
            lines = [*(bad_of(line)._asdict() for line in self.start), *self.later]
            draft = Path(f"{self.path}.{os.getpid()}.part")
            draft.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text("".join(map(_in_json, lines)), encoding="utf-8")
            os.replace(draft, self.path)

    def take(self, found: list[dict], step: int) -> None:
        """Leave out what was found to be broken by a step; DataError where the flags do not allow it.

        found: the same lines on all ranks, in any order. What is said of an error is the same too.
        """
        now = self.left_out.now
        lines = {line["place"]: {"step": step, "since": now, **line} for line in sorted(found, key=str)}
        new = [line for place, line in sorted(lines.items()) if place not in self.places]
        if not new:
            return
        if self.bad_record == "skip":
            self._add(new)
            if self.path is not None:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write("".join(map(_in_json, new)))
        if self.num_records is None:
            return
        skips = self.bad_record == "skip"
        bad = [bad_of(line) for line in ([*self.start, *self.later] if skips else new)]
        try:
            apply_policy(bad, self.num_records, self.bad_record, self.max_bad_share)
        except DataError as error:
            failure = DataError(f"at step {step}: {error}")
            failure.told_by_first_of = "RANK"
            raise failure from None
        logger.warning(
            "step %d: %s cannot be used and will be left out from here on, on every rank: %s",
            step, number(len(new), "record"), "; ".join(str(bad_of(line)) for line in new),
        )  # fmt: skip

    def _add(self, lines: list[dict]) -> None:
        for line in lines:
            self.left_out.add(line["place"], line["since"])
            if line["place"] not in self.places:
                self.later.append(line)
                self.places.add(line["place"])

    def state(self) -> dict:
        """Return what a checkpoint keeps."""
        return {"start": self.start, "later": self.later}


def _in_json(line: dict) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


class SkipMixin:
    """Trainer overrides: what a step or an evaluation could not read is settled at its end, on all ranks together.

    facts: the RunFacts of a run; without them records that cannot be read end it in the worker that meets them.
    """

    is_streaming = False

    def __init__(self, *args, facts=None, **kwargs):
        self.facts = facts
        self.found = {"train": [], "eval": []}
        # Why a stream cannot go on.
        self.end_of_stream = None
        super().__init__(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a step, having taken out what could not be read."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self.found["train"] += batch.pop("left_out", ())
        return batches, num_items

    @property
    def has_news(self) -> bool:
        """Whether this rank met something in this step that the others must know."""
        return bool(self.found["train"]) or self.end_of_stream is not None

    def settle(self, name: str = "train") -> None:
        """Leave out on every rank what any of them could not read; all must call it. DataError if it may not be."""
        found = [line for lines in everyone(self.found[name]) for line in lines]
        self.found[name] = []
        if self.is_streaming:
            raise_together(self.end_of_stream, DataError, f"The run stopped at step {self.state.global_step}.")
        if name in getattr(self.facts, "logs", ()):
            # Before the first step of a run that goes on, its state is not read yet.
            self.facts.logs[name].take(found, max(self.state.global_step, self.facts.step))

    def leave_out(self, problems: list[dict]) -> None:
        """Leave records of training out before it begins, each rank what it has found; all must call it."""
        self.found["train"] += problems
        self.settle()

    def _run_epoch(self, *args, **kwargs):
        """Tell the workers which epoch it is before they read."""
        self._begin("train", kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)

    def _begin(self, name: str, time: int) -> None:
        if name in getattr(self.facts, "logs", ()):
            self.facts.logs[name].left_out.begin(time)

    def prediction_step(self, model, inputs, *args, **kwargs):
        """Take out what could not be read of a batch of an evaluation."""
        self.found["eval"] += inputs.pop("left_out", ())
        return super().prediction_step(model, inputs, *args, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        """Evaluate, and settle what could not be read of it."""
        self._begin("eval", self.state.global_step)
        output = super().evaluation_loop(*args, **kwargs)
        if "eval" in getattr(self.facts, "logs", ()):
            self.settle("eval")
        return output
