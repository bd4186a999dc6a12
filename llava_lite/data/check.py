"""Check every record and picture before step 1, and say what to do about those that cannot be used."""

import json
import os
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from llava_lite.anyres import PictureLayout
from llava_lite.data.cache import key_of
from llava_lite.data.check_report import Report, kinds_of
from llava_lite.data.encode import RecordEncoder
from llava_lite.data.facts import slots_of
from llava_lite.data.index import Annotations
from llava_lite.data.look_again import look_again
from llava_lite.data.picture_files import PictureMeter
from llava_lite.data.records import missing_images
from llava_lite.data.scan import DataError
from llava_lite.data.text_counts import count_texts

NUM_NAMED = 20
# Threads that look at picture files: most of the time goes to waiting for a disk or a network.
NUM_THREADS = 16


class BadRecord(NamedTuple):
    """A record that cannot be used: where it is, and why."""

    file: str
    position: int  # in the file, from 0
    id: str | None  # None where there is no record to be read
    kind: Literal["record", "text", "placeholder", "picture", "length"]
    reason: str

    def __str__(self):
        """Say it on one line."""
        where = f"{os.path.basename(self.file)}[{self.position}]"
        name = where if self.id is None else f"record {self.id!r} ({where})"
        return self.reason if where in self.reason else f"{name}: {self.reason}"


class Before(NamedTuple):
    """What a run that goes on leaves out, by number over all files: at its first start, and what it met since."""

    start: dict[int, BadRecord]
    later: dict[int, BadRecord]

    def has(self, place: int) -> bool:
        """Tell whether a record is left out already."""
        return place in self.start or place in self.later


def token_end(annotations: Annotations) -> tuple[np.ndarray, np.ndarray]:
    """Return where the last picture ends and where the first learned token stands, [N] each, features counted."""
    facts = annotations.token_facts()
    more = annotations.picture_tokens() - annotations.num_pictures
    picture_end = np.where(facts.last_picture < 0, 0, facts.last_picture + 1 + more)
    more_before = annotations.picture_tokens(facts.pictures_before) - facts.pictures_before
    return picture_end, facts.first_learned + more_before


def _length_problems(annotations: Annotations, max_length: int) -> dict[int, str]:
    """Return the records of which truncation would cut a picture or leave nothing to learn."""
    lengths, num_learned = annotations.token_lengths, annotations.token_facts().num_learned
    picture_end, first_learned = token_end(annotations)
    problems = {}
    for i in np.flatnonzero(num_learned == 0).tolist():
        problems[i] = "nothing to learn: no token of it belongs to an answer. Give it an answer or remove it."
    beyond = f"beyond the maximum of {max_length}. Raise --model_max_length, or shorten the record."
    for i in np.flatnonzero((first_learned >= max_length) & (num_learned > 0)).tolist():
        problems[i] = f"nothing to learn: the answer begins at token {first_learned[i]} of {lengths[i]}, {beyond}"
    for i in np.flatnonzero(picture_end > max_length).tolist():
        problems[i] = f"its last picture ends at token {picture_end[i]} of {lengths[i]}, {beyond}"
    return problems


def _find_problems(
    annotations, encoder, layout, max_length, meter, num_workers, placeholder_as_text
) -> dict[int, tuple[str, str]]:
    """Return kind and reason of every record in use that cannot be used; the tables are complete afterwards."""
    found = {}
    pictures = f"pictures-{key_of(meter.decode, meter.follow_links)}"
    facts = annotations.record_facts()
    for i in np.flatnonzero(facts.num_images < 0).tolist():
        try:
            annotations[i]
        except ValueError as error:
            found[i] = ("record", str(error))
    for i in [] if placeholder_as_text else np.flatnonzero(facts.num_missing > 0).tolist():
        found[i] = ("placeholder", missing_images(annotations[i]))
    for i, error in annotations.count_tokens(encoder, layout, num_workers).items():
        found.setdefault(i, ("text", str(error)))
    annotations.tables = annotations.tables._replace(pictures=pictures)
    checked = annotations.complete(pictures, 3, meter, "checking pictures", per_picture=True, num_threads=NUM_THREADS)
    for i, error in (checked | look_again(annotations, pictures, 3, meter, NUM_THREADS)).items():
        found.setdefault(i, ("picture", str(error)))
    for i, reason in _length_problems(annotations, max_length).items():
        found.setdefault(i, ("length", reason))
    return dict(sorted(found.items()))


def _bad_record(annotations: Annotations, i: int, kind: str, reason: str) -> BadRecord:
    file, position = annotations.place(i)
    record_id = None if kind == "record" else annotations[i].id
    return BadRecord(file.source.path, position, record_id, kind, reason)


def _other_suffixes(annotations: Annotations) -> int:
    count = 0
    for file, positions, _ in annotations.by_file():
        table = file.table(annotations.tables.pictures, 3, per_picture=True)
        count += int((table.rows()[slots_of(table.starts, positions), 2] == 1).sum())
    return count


def check_annotations(
    annotations: Annotations,
    encoder: RecordEncoder,
    layout: PictureLayout,
    max_length: int,
    bad_record: Literal["raise", "skip"] = "raise",
    max_bad_share: float = 0.01,
    ledger_path: str | os.PathLike | None = None,
    decode: bool = False,
    follow_links: bool = False,
    num_workers: int = 0,
    placeholder_as_text: bool = False,
    before: Before | None = None,
) -> Report:
    """Return what the records hold, having looked at every one of them and at every picture.

    layout: how a picture becomes features; max_length: tokens of a sequence, features counted.
    bad_record: `raise` refuses the data, naming the first 20 records and counting all; `skip` leaves them out and
    writes them to `ledger_path` (one JSON object a line), unless they are more than `max_bad_share` of all.
    decode: decode every picture as well, which takes as long as an epoch of loading. follow_links: see safe_path.
    placeholder_as_text: take `<image>` in a record without images for text, counted in the report; else such a record
    is a bad one. before: what a run that goes on leaves out; what is bad beyond that stays in, as Report.late.
    What is left depends on the data alone, so ranks agree without talking; Report.digest lets them make sure.
    """
    meter = PictureMeter(decode, follow_links)
    problems = _find_problems(annotations, encoder, layout, max_length, meter, num_workers, placeholder_as_text)
    numbers = np.arange(len(annotations)) if annotations.selection is None else annotations.selection
    found = {int(numbers[i]): _bad_record(annotations, i, *problem) for i, problem in problems.items()}
    start = found if before is None else before.start
    late = {place: bad for place, bad in found.items() if before is not None and not before.has(place)}
    new = list((found if before is None else late).values())
    known = [] if before is None or bad_record == "raise" else [*before.start.values(), *before.later.values()]
    apply_policy([*known, *new], len(annotations), bad_record, max_bad_share)
    bad = list(start.values())
    if bad:
        annotations = annotations.select(np.flatnonzero(~np.isin(numbers, list(start))))
    if ledger_path is not None:
        write_ledger(ledger_path, bad)
    lengths, facts = annotations.token_lengths, annotations.record_facts()
    return Report(
        annotations,
        bad,
        num_records=len(annotations),
        num_with_picture=int(annotations.has_picture.sum()),
        num_tokens=int(np.minimum(lengths, max_length).sum()),
        learned_share=annotations.learned_share,
        num_truncated=int((lengths > max_length).sum()),
        num_other_suffix=_other_suffixes(annotations),
        num_turns=facts.num_turns,
        lengths=lengths,
        empty_answers=facts.num_empty,
        text_placeholders=facts.num_missing,
        texts=count_texts(annotations, encoder.template.options.special_tokens_in_text),
        left_out=start,
        late=late,
    )


def apply_policy(bad: list[BadRecord], num_records: int, bad_record: str, max_bad_share: float) -> None:
    """Raise DataError, naming the first of some bad records, unless they may be left out; see check_annotations."""
    if bad_record not in ("raise", "skip"):
        raise ValueError(f"unknown bad_record {bad_record!r}; known: raise, skip.")
    too_many = len(bad) > max_bad_share * num_records
    if not bad or (bad_record == "skip" and not too_many):
        return
    named = "\n".join(f"  {entry}" for entry in bad[:NUM_NAMED])
    more = f"\n  ... and {len(bad) - NUM_NAMED:,} more" if len(bad) > NUM_NAMED else ""
    if bad_record == "raise":
        advice = "Mend them, or leave them out with --bad_record skip."
    else:
        advice = f"That is {len(bad) / num_records:.2%}; --bad_record skip leaves out at most {max_bad_share:.2%}."
    raise DataError(
        f"{len(bad):,} of {num_records:,} records cannot be used ({kinds_of(bad)}):\n{named}{more}\n{advice}"
    )


def write_ledger(path: str | os.PathLike, bad: list[BadRecord]) -> None:
    """Write the records that were left out, one JSON object a line; every rank would write the same bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    draft.write_text(
        "".join(json.dumps(entry._asdict(), ensure_ascii=False) + "\n" for entry in bad), encoding="utf-8"
    )
    os.replace(draft, path)
