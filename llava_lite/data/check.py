"""Check every record and picture before step 1, and say what to do about those that cannot be used."""

import json
import logging
import math
import os
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from llava_lite.anyres import MERGE_TYPES, PictureLayout
from llava_lite.conversation import get_template
from llava_lite.data.cache import key_of
from llava_lite.data.encode import RecordEncoder
from llava_lite.data.facts import slots_of
from llava_lite.data.index import Annotations
from llava_lite.data.picture_files import PictureMeter
from llava_lite.data.scan import DataError
from llava_lite.data.text_counts import TextCounts, count_texts
from llava_lite.end_marks import refuse_unfit
from llava_lite.pictures import ASPECT_RATIOS

logger = logging.getLogger(__name__)

NUM_NAMED = 20
# Threads that look at picture files: most of the time goes to waiting for a disk or a network.
NUM_THREADS = 16


class BadRecord(NamedTuple):
    """A record that cannot be used: where it is, and why."""

    file: str
    position: int  # in the file, from 0
    id: str | None  # None where there is no record to be read
    kind: Literal["record", "text", "picture", "length"]
    reason: str

    def __str__(self):
        """Say it on one line."""
        where = f"{os.path.basename(self.file)}[{self.position}]"
        name = where if self.id is None else f"record {self.id!r} ({where})"
        return self.reason if where in self.reason else f"{name}: {self.reason}"


@dataclass
class Report:
    """What a check found. `annotations` are the records that are left, `bad` those that are not."""

    annotations: Annotations
    bad: list[BadRecord]
    num_records: int
    num_with_picture: int
    num_tokens: int  # after truncation, every feature of a picture counted
    learned_share: float  # of the tokens before truncation, those that carry a label, 0 to 1
    num_truncated: int
    num_other_suffix: int  # pictures found as .png or .gif where the record says .jpg
    texts: TextCounts = TextCounts()  # noqa: RUF009 - a tuple does not change

    @property
    def digest(self) -> str:
        """A name for what was decided; ranks that disagree on it see different files."""
        return key_of(self.num_records, self.num_tokens, *map(tuple, self.bad))

    def summary(self) -> str:
        """Return the lines that a run prints at its start."""
        num_text = self.num_records - self.num_with_picture
        lines = [
            f"{self.num_records:,} records: {self.num_with_picture:,} with pictures, {num_text:,} text only",
            f"{self.num_tokens:,} tokens, {self.learned_share:.1%} of them learned",
        ]
        if self.num_truncated:
            lines.append(f"{self.num_truncated:,} records are longer than the maximum; what is behind is cut off")
        if self.num_other_suffix:
            lines.append(f"{self.num_other_suffix:,} pictures found under another suffix than their record says")
        lines += self.texts.lines()
        if self.bad:
            lines.append(f"{len(self.bad):,} records left out ({_kinds(self.bad)})")
        return "\n".join(lines)


def _kinds(bad: list[BadRecord]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(Counter(entry.kind for entry in bad).items()))


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


def _find_problems(annotations, encoder, layout, max_length, meter, num_workers) -> dict[int, tuple[str, str]]:
    """Return kind and reason of every record in use that cannot be used; the tables are complete afterwards."""
    found = {}
    pictures = f"pictures-{key_of(meter.decode, meter.follow_links)}"
    unknown = np.flatnonzero(annotations.facts("records", 1)[:, 0] < 0)
    for i in unknown.tolist():
        try:
            annotations[i]
        except ValueError as error:
            found[i] = ("record", str(error))
    for i, error in annotations.count_tokens(encoder, layout, num_workers).items():
        found.setdefault(i, ("text", str(error)))
    annotations.tables = annotations.tables._replace(pictures=pictures)
    checked = annotations.complete(pictures, 3, meter, "checking pictures", per_picture=True, num_threads=NUM_THREADS)
    for i, error in checked.items():
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
) -> Report:
    """Return what the records hold, having looked at every one of them and at every picture.

    layout: how a picture becomes features; max_length: tokens of a sequence, features counted.
    bad_record: `raise` refuses the data, naming the first 20 records and counting all; `skip` leaves them out and
    writes them to `ledger_path` (one JSON object a line), unless they are more than `max_bad_share` of all.
    decode: decode every picture as well, which takes as long as an epoch of loading. follow_links: see safe_path.
    What is left depends on the data alone, so ranks agree without talking; Report.digest lets them make sure.
    """
    meter = PictureMeter(decode, follow_links)
    problems = _find_problems(annotations, encoder, layout, max_length, meter, num_workers)
    bad = [_bad_record(annotations, i, *problem) for i, problem in problems.items()]
    _apply_policy(bad, len(annotations), bad_record, max_bad_share)
    if bad:
        keep = np.setdiff1d(np.arange(len(annotations)), np.fromiter(problems, np.int64))
        annotations = annotations.select(keep)
    if ledger_path is not None:
        write_ledger(ledger_path, bad)
    lengths = annotations.token_lengths
    return Report(
        annotations,
        bad,
        num_records=len(annotations),
        num_with_picture=int(annotations.has_picture.sum()),
        num_tokens=int(np.minimum(lengths, max_length).sum()),
        learned_share=annotations.learned_share,
        num_truncated=int((lengths > max_length).sum()),
        num_other_suffix=_other_suffixes(annotations),
        texts=count_texts(annotations, encoder.template.options.special_tokens_in_text),
    )


def _apply_policy(bad: list[BadRecord], num_records: int, bad_record: str, max_bad_share: float) -> None:
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
        f"{len(bad):,} of {num_records:,} records cannot be used ({_kinds(bad)}):\n{named}{more}\n{advice}"
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


def main(argv=None) -> int:
    """Check annotation files from the command line: `llava-lite check`; 0 if a run could start, else 1."""
    import argparse

    from llava_lite.companions import load_tokenizer, refuse_missing_model
    from llava_lite.data.index import open_annotations

    parser = argparse.ArgumentParser(prog="llava-lite check", description=__doc__)
    parser.add_argument("--data_path", nargs="+", required=True, help="JSON or JSONL files, or YAML mixtures of them")
    parser.add_argument("--image_folder", help="folder that picture paths start from")
    parser.add_argument("--model_name_or_path", required=True, help="whose tokenizer counts the tokens")
    parser.add_argument("--version", default="v1", help="conversation template (default v1)")
    parser.add_argument("--chat_end_mark", help="with --version chat: token that ends answers, where it writes none")
    parser.add_argument(
        "--special_tokens_in_text",
        choices=("token", "text"),
        default="token",
        help="what a special token spelled in a question or an answer is (default token)",
    )
    parser.add_argument("--model_max_length", type=int, default=2048, help="tokens of a sequence (default 2048)")
    parser.add_argument("--num_image_tokens", type=int, default=576, help="features of a picture (default 576)")
    parser.add_argument("--image_aspect_ratio", choices=ASPECT_RATIOS, help="anyres counts the crops of a picture")
    parser.add_argument("--mm_patch_merge_type", choices=MERGE_TYPES, default="flat", help="how crops are joined")
    parser.add_argument("--image_grid_pinpoints", help="resolutions of anyres (default: LLaVA-1.6's five)")
    parser.add_argument("--image_size", type=int, default=336, help="pixels along a side of a crop (default 336)")
    parser.add_argument("--decode", action="store_true", help="decode every picture too; slow")
    parser.add_argument("--follow_links", action="store_true", help="allow links that lead out of the image folder")
    parser.add_argument("--ledger", help="write the bad records to this file, one JSON object a line")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes that count tokens")
    flags = parser.parse_args(argv)
    refuse_missing_model(flags.model_name_or_path)
    # Registers our model types, by which transformers finds the tokenizer of an earlier stage.
    import_module("llava_lite.model")
    tokenizer = load_tokenizer(flags.model_name_or_path)
    choices = {"chat_end_mark": flags.chat_end_mark, "special_tokens_in_text": flags.special_tokens_in_text}
    template = get_template(flags.version, **choices)
    try:
        refuse_unfit(template, tokenizer, flags.version)
        encoder = RecordEncoder(tokenizer, template)
        report = check_annotations(
            open_annotations(flags.data_path, flags.image_folder, num_workers=flags.num_workers),
            encoder,
            PictureLayout.read(
                flags.num_image_tokens,
                math.isqrt(flags.num_image_tokens),
                flags.image_size,
                flags.image_aspect_ratio,
                flags.mm_patch_merge_type,
                flags.image_grid_pinpoints,
            ),
            flags.model_max_length,
            bad_record="skip" if flags.ledger else "raise",
            max_bad_share=1.0,
            ledger_path=flags.ledger,
            decode=flags.decode,
            follow_links=flags.follow_links,
            num_workers=flags.num_workers,
        )
    except ValueError as error:
        print(error)
        return 1
    print(report.summary())
    return 1 if report.bad else 0
