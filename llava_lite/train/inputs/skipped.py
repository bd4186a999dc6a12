"""Turn records that workers could not read into a decision of all ranks: a line of a skipped-records log, or an error.

data/skipped.py has which records are left out, and what is read in their place.
"""

import json
import logging
import os
from pathlib import Path

from llava_lite.data.check.check import BadRecord, apply_policy
from llava_lite.data.check.report import number
from llava_lite.data.errors import DataError
from llava_lite.data.skipped import LeftOut
from llava_lite.distributed.ranks import everyone, raise_together
from llava_lite.errors import DiskError, named_disk_errors
from llava_lite.output_file import ESCAPED
from llava_lite.train.monitor.run_log import ADVICE
from llava_lite.train.together import together

logger = logging.getLogger(__name__)


def get_bad(line: dict) -> BadRecord:
    """Return the bad record that a line of the log, or of a checkpoint, describes."""
    # Earlier versions wrote no path.
    return BadRecord(**{field: line.get(field) for field in BadRecord._fields})


class SkipLog:
    """The records that a run leaves out of one of its data sets: the same on every rank, on the first also a file.

    left_out: the table that the workers read. bad_record, max_bad_fraction: the flags. path: of the log, None to write
    none. num_records: all records of the data set; None for shards. start: lines of records that the check before the
    first step found; later: lines of records that could not be read since, with "step" and "since".
    """

    def __init__(self, left_out: LeftOut, bad_record: str, max_bad_fraction: float, path=None, num_records=None):
        self.left_out, self.bad_record, self.max_bad_fraction = left_out, bad_record, max_bad_fraction
        self.path, self.num_records = path, num_records
        self.start, self.later, self.places = [], [], set()

    def begin(self, start: list[dict], later: list[dict]) -> None:
        """Restore what a resumed run has left out so far, and write the log again."""
        self.start = list(start)
        self._add(later)
        if self.path is not None:
            data = _to_lines([*(get_bad(line)._asdict() for line in self.start), *self.later])
            draft = Path(f"{self.path}.{os.getpid()}.part")
            with named_disk_errors(self.path, ADVICE, len(data)):
                try:
                    draft.parent.mkdir(parents=True, exist_ok=True)
                    draft.write_bytes(data)
                    os.replace(draft, self.path)
                finally:
                    draft.unlink(missing_ok=True)

    def leave_out(self, found: list[dict], step: int) -> None:
        """Leave out the records that were found broken at a step; DataError where the flags do not allow it.

        found: the same lines on all ranks, in any order; so the message of an error is the same too.
        """
        now = self.left_out.now
        lines = {line["place"]: {"step": step, "since": now, **line} for line in sorted(found, key=str)}
        new = [line for place, line in sorted(lines.items()) if place not in self.places]
        if not new:
            return
        if self.bad_record == "skip":
            self._add(new)
            with together(DiskError, f"The run stopped at step {step}.", OSError):
                self._write(new)
        if self.num_records is None:
            return
        skips = self.bad_record == "skip"
        bad = [get_bad(line) for line in ([*self.start, *self.later] if skips else new)]
        try:
            apply_policy(bad, self.num_records, self.bad_record, self.max_bad_fraction)
        except DataError as error:
            failure = DataError(f"at step {step}: {error}")
            failure.reported_by_first_of = "RANK"
            raise failure from None
        logger.warning(
            "step %d: %s cannot be used; every rank leaves them out from here on: %s",
            step, number(len(new), "record"), "; ".join(str(get_bad(line)) for line in new),
        )  # fmt: skip

    def _write(self, lines: list[dict]) -> None:
        """Append lines to the file, on the rank that has one."""
        if self.path is not None:
            data = _to_lines(lines)
            with named_disk_errors(self.path, ADVICE, len(data)), open(self.path, "ab") as file:
                file.write(data)

    def _add(self, lines: list[dict]) -> None:
        for line in lines:
            self.left_out.add(line["place"], line["since"])
            if line["place"] not in self.places:
                self.later.append(line)
                self.places.add(line["place"])

    def state(self) -> dict:
        """Return what a checkpoint keeps."""
        return {"start": self.start, "later": self.later}


def _to_lines(lines: list[dict]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8", ESCAPED)


class SkipMixin:
    """Trainer overrides: all ranks agree at the end of a step or an evaluation on the records that it could not read.

    facts: the RunFacts of a run; without them a record that cannot be read raises in the worker that reads it.
    """

    # See StreamMixin; a stream may end the run.
    stream = None

    def __init__(self, *args, facts=None, **kwargs):
        self.facts, self.logs = facts, {} if facts is None else facts.logs
        self.found = {"train": [], "eval": []}
        # The error that ends a stream.
        self.end_of_stream = None
        super().__init__(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a step, without the lines of records that could not be read."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self.found["train"] += batch.pop("left_out", ())
        return batches, num_items

    @property
    def has_news(self) -> bool:
        """Whether this rank found something in this step that the others must know."""
        return bool(self.found["train"]) or self.end_of_stream is not None

    def agree_on_left_out(self, name: str = "train") -> None:
        """Leave out on every rank what any rank could not read; all must call it. DataError if the flags forbid it."""
        found = [line for lines in everyone(self.found[name]) for line in lines]
        self.found[name] = []
        if self.stream is not None:
            raise_together(self.end_of_stream, DataError, f"The run stopped at step {self.state.global_step}.")
        # Nothing is wrong with these records: no flag leaves them out.
        damaged = sorted(line["reason"] for line in found if line.get("kind") == "features")
        if damaged:
            failure = DataError(f"at step {self.state.global_step}: {damaged[0]}")
            failure.reported_by_first_of = "RANK"
            raise failure
        if name in self.logs:
            # Before the first step of a resumed run its state is not read yet.
            self.logs[name].leave_out(found, max(self.state.global_step, self.facts.step))

    def leave_out(self, problems: list[dict]) -> None:
        """Leave out training records before the first step, each rank what it has found; all must call it."""
        self.found["train"] += problems
        self.agree_on_left_out()

    def begin_epoch(self, epoch: int) -> None:
        """Give the workers the number of the epoch before they read."""
        self._begin("train", epoch)
        if hasattr(self.train_dataset, "begin_epoch"):
            self.train_dataset.begin_epoch(epoch)

    def _begin(self, name: str, time: int) -> None:
        if name in self.logs:
            self.logs[name].left_out.begin(time)

    def prediction_step(self, model, inputs, *args, **kwargs):
        """Evaluate a batch, without the lines of records that could not be read."""
        self.found["eval"] += inputs.pop("left_out", ())
        return super().prediction_step(model, inputs, *args, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        """Evaluate, and agree with all ranks on the records that could not be read."""
        self._begin("eval", self.state.global_step)
        output = super().evaluation_loop(*args, **kwargs)
        if "eval" in self.logs:
            self.agree_on_left_out("eval")
        return output
