"""Turn annotation files and the flags of a run into what a check finds: `llava-lite check`."""

import argparse
import dataclasses
import math
import os
import sys

from llava_lite.commands.check_flags import OWN, build_parser
from llava_lite.data.check.check import NUM_NAMED, apply_policy, write_skipped_log
from llava_lite.data.check.report import Report, get_kinds, number
from llava_lite.data.check.report_file import report_content, write_report_file
from llava_lite.data.errors import DataError
from llava_lite.data.index.annotations import open_annotations
from llava_lite.errors import get_sentence
from llava_lite.media.layout import ImageLayout
from llava_lite.train.arguments.legacy import RENAMED, TRANSLATED, WITHOUT_EFFECT, join_flags, open_yaml, split_flags
from llava_lite.train.arguments.words import meant_by, unknown_flags, words_left

# The errors of a run that are for the person who wrote its flags.
FOR_PEOPLE = (ValueError, OSError, ImportError)
NOT_READY = "not ready: "


def parse_flags(argv) -> argparse.Namespace:
    """Return the flags; those of training without effect on the data are named under `passed_over`."""
    parser = build_parser()
    words = [
        word
        for name, values in split_flags(open_yaml(argv))
        for word in ([f"--{RENAMED.get(name, name)}"] if name else []) + values
    ]
    flags, rest = parser.parse_known_args(words)
    flags.passed_over = [name for name, _ in split_flags(rest) if name]
    known = {action.dest for action in parser._actions} | training_flags() if rest else set()
    unknown = [f"--{name}" for name in flags.passed_over if name not in known]
    if unknown:
        names = [*parser.flags.values(), *(f"--{name}" for name in known)]
        # What `check` has no flag for may be one of the run's.
        parser.error(
            " ".join(
                unknown_flags("check" if meant_by("check", flag, names) else "train", [flag], names)
                for flag in dict.fromkeys(unknown)
            )
        )
    if rest[:1] and not rest[0].startswith("--"):
        parser.error(words_left("check", rest))
    for name in ("data_path", "model_name_or_path"):
        if getattr(flags, name) is None:
            what = "one or more files of records" if name == "data_path" else "whose tokenizer counts the tokens"
            raise ValueError(f"--{name} is needed: {what}.")
    if flags.image_folder is not None and not os.path.isdir(flags.image_folder):
        raise ValueError(f"--image_folder {flags.image_folder}: there is no such directory.")
    flags.of_run = join_flags([(name, values) for name, values in split_flags(words) if name not in OWN])
    return flags


def training_flags() -> set[str]:
    """Return the names of all flags of a training run."""
    from llava_lite.train.arguments.fields import DataArguments, ModelArguments, TrainingArguments

    classes = (DataArguments, ModelArguments, TrainingArguments)
    return {*WITHOUT_EFFECT, *TRANSLATED, "local_rank"} | {
        field.name for one in classes for field in dataclasses.fields(one)
    }


def open_run(flags):
    """Return the run that the flags describe, without its weights, as a DryRun."""
    from llava_lite.train.dry_run import DryRun

    if flags.num_image_tokens is None:
        return DryRun(flags.of_run)
    layout = ImageLayout.read(
        flags.num_image_tokens,
        math.isqrt(flags.num_image_tokens),
        flags.image_size,
        flags.image_aspect_ratio,
        flags.mm_patch_merge_type or "flat",
        flags.image_grid_pinpoints,
    )
    return DryRun(flags.of_run, layout)


def get_head(run) -> str | None:
    """Return the line on what a run makes of an image; None for a model without a tower."""
    if run.layout is None:
        return None
    length = f"up to {run.layout.most_tokens:,} (anyres)" if run.layout.is_anyres else f"{run.layout.num_features:,}"
    longest = run.training_args.model_max_length
    return f"an image is {length} tokens; template {run.model_args.version}, at most {longest:,} tokens"


def check_files(paths, run, flags):
    """Print what the check finds in some files; return their examples, and its report."""
    if run.layout is None:
        annotations = open_annotations(paths, flags.image_folder, num_workers=flags.num_workers)
        if annotations.has_image.any():
            raise DataError(
                f"{', '.join(paths)}: {int(annotations.has_image.sum()):,} records have images, and "
                f"{flags.model_name_or_path} has no vision tower, so that nobody knows how many features an image "
                "has. Name the tower of the run with --vision_tower, or give --num_image_tokens."
            )
    dataset, report = run.open(paths, flags.num_workers, flags.decode)
    if report.bad:
        total = report.num_records + len(report.bad)
        print(f"{len(report.bad):,} of {total:,} records cannot be used ({get_kinds(report.bad)}):")
        print("\n".join(f"  {entry}" for entry in report.bad[:NUM_NAMED]))
        if len(report.bad) > NUM_NAMED:
            more = "" if flags.bad_records_file else "; --bad_records_file FILE writes all of them"
            print(f"  ... and {len(report.bad) - NUM_NAMED:,} more{more}")
    print(report.summary())
    return dataset, report


def judge_bad_records(report: Report, flags) -> tuple[bool, str]:
    """Return whether --bad_record and --max_bad_fraction of the run allow its bad records, and the message."""
    num_bad, total = len(report.bad), report.num_records + len(report.bad)
    try:
        apply_policy(report.bad, total, flags.bad_record, flags.max_bad_fraction)
    except DataError:
        if not report.num_records:
            return False, f"{NOT_READY}none of {number(total, 'record')} can be used."
        if flags.bad_record == "raise":
            what = "record must" if num_bad == 1 else "records must"
            return False, f"{NOT_READY}{num_bad:,} {what} be mended, or left out with --bad_record skip."
        return False, (
            f"{NOT_READY}{num_bad:,} of {total:,} records ({num_bad / total:.2%}) cannot be used, and --bad_record "
            f"skip leaves out at most {flags.max_bad_fraction:.2%}. Mend them, or raise --max_bad_fraction."
        )
    if not num_bad:
        return True, f"ready to train: {'all ' * (total > 1)}{number(total, 'record')} can be used."
    return True, f"ready to train: {number(report.num_records, 'record')}; {num_bad:,} left out (--bad_record skip)."


def try_to_write(write, path, *content) -> list[str]:
    """Write a file that a flag names; return no line, or one that says why it could not be written."""
    try:
        write(path, *content)
    except OSError as error:
        return [f"not written: {get_sentence(error)}"]
    return []


def show_batches(run, sets, flags) -> list[str]:
    """Write the page of the first batches; DataError for a record in them that cannot be read, as training would.

    Returns the lines of try_to_write.
    """
    from llava_lite.train.preview.page import write_page
    from llava_lite.train.preview.read import read_batches

    if flags.num_image_tokens is not None:
        raise ValueError("--show needs the tower that prepares images: give --vision_tower, not --num_image_tokens.")
    batches, problems = read_batches(run, *sets, flags.show)
    unwritten = try_to_write(write_page, flags.page, run, batches)
    if not unwritten:
        print(f"{flags.page}: {number(len(batches), 'batch', 'batches')}")
    run.facts.logs["train"].leave_out(problems, 0)
    return unwritten


def check_run(flags, reports: dict[str, tuple[list[str], Report]], unwritten: list[str]) -> tuple[bool, list[str]]:
    """Return whether a run with these flags would reach its first step, and the lines that say so.

    reports: receives paths and report of the files that are trained on, "train", and evaluated on, "eval". unwritten:
    receives a line if the page of --show could not be written, which says nothing about the run.
    """
    run = open_run(flags)
    head = get_head(run)
    if head is not None:
        print(head)
    opened = {}
    for name, paths in (("train", flags.data_path), ("eval", flags.eval_data_path)):
        if paths is None:
            continue
        if flags.eval_data_path:
            print(f"{', '.join(paths)}:")
        opened[tuple(paths)] = check_files(paths, run, flags)
        reports[name] = (paths, opened[tuple(paths)][1])
    judged = [judge_bad_records(report, flags) for _, report in reports.values()]
    refused = [line for is_ready, line in judged if not is_ready]
    try:
        with run.start(opened) as sets:
            if flags.show:
                unwritten += show_batches(run, sets, flags)
    except FOR_PEOPLE as error:
        refused = refused or [f"{NOT_READY}{get_sentence(error)}"]
    return not refused, refused or [line for _, line in judged]


def write_report(flags, reports: dict, reason: str | None) -> list[str]:
    """Write the report for programs, if --report asks for one; return the lines of try_to_write."""
    if flags.report is None:
        return []
    names = "model_name_or_path vision_tower image_folder version model_max_length bad_record max_bad_fraction tuning"
    settings = {name: getattr(flags, name) for name in names.split()}
    return try_to_write(write_report_file, flags.report, report_content(settings, reports, reason))


def main(argv=None) -> int:
    """Check the data of a run from the command line.

    Returns 0 if the run would reach its first step and all files were written that flags ask for, else 1.
    """
    flags = parse_flags(sys.argv[1:] if argv is None else argv)
    reports, unwritten = {}, []
    try:
        is_ready, lines = check_run(flags, reports, unwritten)
    except FOR_PEOPLE as error:
        for line in [*unwritten, *write_report(flags, reports, get_sentence(error))]:
            print(line)
        raise
    if flags.bad_records_file:
        bad = [bad for _, report in reports.values() for bad in report.bad]
        unwritten += try_to_write(write_skipped_log, flags.bad_records_file, bad)
    unwritten += write_report(flags, reports, None if is_ready else " ".join(lines).removeprefix(NOT_READY))
    print("\n".join([*lines, *unwritten]))
    return 0 if is_ready and not unwritten else 1
