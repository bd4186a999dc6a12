"""Check every record and image before step 1, and report those that cannot be used."""

import json
import os
from typing import Literal, NamedTuple

import numpy as np

from llava_lite.conversation import get_template
from llava_lite.data.check.image_meter import ImageMeter
from llava_lite.data.check.image_names import open_names
from llava_lite.data.check.recheck import StampedMeter, recheck_images
from llava_lite.data.check.report import Report, get_kinds
from llava_lite.data.check.text_counts import count_texts
from llava_lite.data.encode import RecordEncoder
from llava_lite.data.errors import DataError
from llava_lite.data.index.annotations import IMAGE_COLUMNS, Annotations
from llava_lite.data.index.cache import get_key
from llava_lite.data.index.tables import get_slots
from llava_lite.data.records.record import missing_images
from llava_lite.media.layout import ImageLayout
from llava_lite.output_file import write_output

NUM_NAMED = 20
# Threads that check image files: they mostly wait for a disk or a network.
NUM_THREADS = 16


class BadRecord(NamedTuple):
    """A record that cannot be used: its position and the reason."""

    file: str
    position: int  # in the file, from 0
    id: str | None  # None if the record cannot be read
    kind: Literal["record", "text", "placeholder", "image", "length"]
    reason: str
    path: str | None = None  # of the image or the other file that the reason is about

    def __str__(self):
        """Return one line with name, position and reason."""
        where = f"{os.path.basename(self.file)}[{self.position}]"
        name = where if self.id is None else f"record {self.id!r} ({where})"
        return self.reason if where in self.reason else f"{name}: {self.reason}"


def get_path(error: BaseException | None) -> str | None:
    """Return the file that an error is about, if it names one."""
    path = getattr(error, "path", None)
    return path if isinstance(path, str) else None


class Before(NamedTuple):
    """The records that a resumed run leaves out, by number over all files: from its first start, and found since."""

    start: dict[int, BadRecord]
    later: dict[int, BadRecord]

    def has(self, place: int) -> bool:
        """Return whether a record is left out already."""
        return place in self.start or place in self.later


def token_end(annotations: Annotations) -> tuple[np.ndarray, np.ndarray]:
    """Return the end of the last image and the position of the first supervised token, [N] each, with features."""
    facts = annotations.token_facts()
    more = annotations.image_tokens() - annotations.num_images
    image_end = np.where(facts.last_image < 0, 0, facts.last_image + 1 + more)
    more_before = annotations.image_tokens(facts.images_before) - facts.images_before
    return image_end, facts.first_supervised + more_before


def _length_problems(annotations: Annotations, max_length: int) -> dict[int, str]:
    """Return the reasons of records without supervised tokens, and of those that truncation would spoil."""
    lengths, num_supervised = annotations.token_lengths, annotations.token_facts().num_supervised
    image_end, first_supervised = token_end(annotations)
    problems = {}
    for i in np.flatnonzero(num_supervised == 0).tolist():
        problems[i] = "no supervised token: none of its tokens belongs to an answer. Give it an answer or remove it."
    beyond = f"beyond the maximum of {max_length}. Raise --model_max_length, or shorten the record."
    for i in np.flatnonzero((first_supervised >= max_length) & (num_supervised > 0)).tolist():
        problems[i] = (
            f"no supervised token: the answer begins at token {first_supervised[i]} of {lengths[i]}, {beyond}"
        )
    for i in np.flatnonzero(image_end > max_length).tolist():
        problems[i] = f"its last image ends at token {image_end[i]} of {lengths[i]}, {beyond}"
    return problems


def _find_problems(
    annotations, encoder, layout, max_length, meter, num_workers, placeholder_as_text
) -> dict[int, tuple]:
    """Return kind, reason and perhaps path of every record that cannot be used; the tables are complete afterwards."""
    found = {}
    images, meter = f"images-{get_key('stamped', *meter.key)}", StampedMeter(meter)
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
    annotations.tables = annotations.tables._replace(images=images)
    # First those that were checked before: afterwards all are.
    changed = recheck_images(annotations, images, meter, NUM_THREADS)
    options = {"per_image": True, "num_threads": NUM_THREADS}
    checked = annotations.complete(images, IMAGE_COLUMNS, meter, "checking images", **options)
    for file in annotations.files:
        # For the next check.
        open_names(file, NUM_THREADS)
    for i, error in (changed | checked).items():
        found.setdefault(i, ("image", str(error), get_path(error)))
    for i, reason in _length_problems(annotations, max_length).items():
        found.setdefault(i, ("length", reason))
    return dict(sorted(found.items()))


def _bad_record(annotations: Annotations, i: int, kind: str, reason: str, path: str | None = None) -> BadRecord:
    file, position = annotations.place(i)
    record_id = None if kind == "record" else annotations[i].id
    return BadRecord(file.source.path, position, record_id, kind, reason, path)


def _other_suffixes(annotations: Annotations) -> int:
    count = 0
    for file, positions, _ in annotations.by_file():
        table = file.table(annotations.tables.images, IMAGE_COLUMNS, per_image=True)
        count += int((table.rows()[get_slots(table.starts, positions), 2] == 1).sum())
    return count


def check_annotations(
    annotations: Annotations,
    encoder: RecordEncoder,
    layout: ImageLayout,
    max_length: int,
    bad_record: Literal["raise", "skip"] = "raise",
    max_bad_fraction: float = 0.01,
    skipped_log_path: str | os.PathLike | None = None,
    decode: bool = False,
    follow_links: bool = False,
    num_workers: int = 0,
    placeholder_as_text: bool = False,
    before: Before | None = None,
) -> Report:
    """Return a report on all records and images, after a check of each.

    layout: how an image becomes features; max_length: tokens of a sequence, with features. bad_record: `raise` raises
    DataError with the first 20 bad records and their number; `skip` leaves them out and writes them to
    `skipped_log_path` (one JSON object a line), unless they are more than `max_bad_fraction` of all. decode: also
    decode every image, which takes as long as an epoch of loading. follow_links: see safe_path. placeholder_as_text:
    `<image>` in a record without images is text, and counted in the report; else such a record is a bad one. before:
    the records that a resumed run leaves out; other bad records stay in, as Report.late. The result depends on the
    data only, so ranks agree without communication; Report.digest lets them verify it.
    """
    meter = ImageMeter(layout, decode, follow_links)
    problems = _find_problems(annotations, encoder, layout, max_length, meter, num_workers, placeholder_as_text)
    numbers = np.arange(len(annotations)) if annotations.selection is None else annotations.selection
    found = {int(numbers[i]): _bad_record(annotations, i, *problem) for i, problem in problems.items()}
    start = found if before is None else before.start
    late = {place: bad for place, bad in found.items() if before is not None and not before.has(place)}
    new = list((found if before is None else late).values())
    known = [] if before is None or bad_record == "raise" else [*before.start.values(), *before.later.values()]
    apply_policy([*known, *new], len(annotations), bad_record, max_bad_fraction)
    bad = list(start.values())
    if bad:
        annotations = annotations.select(np.flatnonzero(~np.isin(numbers, list(start))))
    if skipped_log_path is not None:
        write_skipped_log(skipped_log_path, bad)
    lengths, facts = annotations.token_lengths, annotations.record_facts()
    return Report(
        annotations,
        bad,
        num_records=len(annotations),
        num_with_image=int(annotations.has_image.sum()),
        num_tokens=int(np.minimum(lengths, max_length).sum()),
        supervised_fraction=annotations.supervised_fraction,
        num_truncated=int((lengths > max_length).sum()),
        num_other_suffix=_other_suffixes(annotations),
        num_turns=facts.num_turns,
        lengths=lengths,
        empty_answers=facts.num_empty,
        text_placeholders=facts.num_missing,
        texts=count_texts(annotations, encoder.template.options.special_tokens_in_text),
        left_out=start,
        late=late,
        num_media=annotations.count_media(),
        num_first_pairs=_count_first_pairs(annotations, encoder.template.is_single_turn),
    )


def _count_first_pairs(annotations: Annotations, is_single_turn: bool) -> int:
    """Return how many records have several questions and a template of one; is_single_turn: whether the run's is."""
    num_turns, count = annotations.record_facts().num_turns, 0
    for file, _, numbers in annotations.by_file():
        own = file.source.template
        if is_single_turn if own is None else get_template(own).is_single_turn:
            count += int((num_turns[numbers] > 2).sum())
    return count


def apply_policy(bad: list[BadRecord], num_records: int, bad_record: str, max_bad_fraction: float) -> None:
    """Raise DataError with the first bad records, unless they may be left out; see check_annotations."""
    if bad_record not in ("raise", "skip"):
        raise ValueError(f"unknown bad_record {bad_record!r}; known: raise, skip.")
    too_many = len(bad) > max_bad_fraction * num_records
    if not bad or (bad_record == "skip" and not too_many):
        return
    named = "\n".join(f"  {entry}" for entry in bad[:NUM_NAMED])
    more = f"\n  ... and {len(bad) - NUM_NAMED:,} more" if len(bad) > NUM_NAMED else ""
    if bad_record == "raise":
        advice = "Mend them, or leave them out with --bad_record skip."
    else:
        advice = f"That is {len(bad) / num_records:.2%}; --bad_record skip leaves out at most {max_bad_fraction:.2%}."
    raise DataError(
        f"{len(bad):,} of {num_records:,} records cannot be used ({get_kinds(bad)}):\n{named}{more}\n{advice}"
    )


def write_skipped_log(path: str | os.PathLike, bad: list[BadRecord]) -> None:
    """Write the skipped-records log: one JSON object a line, the same on every rank; see write_output."""
    lines = (json.dumps(entry._asdict(), ensure_ascii=False) + "\n" for entry in bad)
    write_output(path, "".join(lines), "bad_records.jsonl")
