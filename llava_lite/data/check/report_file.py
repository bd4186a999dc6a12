"""Write what a check finds as JSON, for programs; docs/data.md describes the fields."""

import json
import os
from collections import Counter

import numpy as np

from llava_lite import __version__
from llava_lite.data.check.report import Report
from llava_lite.output_file import write_output

# Increased when a field changes its name or its meaning; new fields may come without.
SCHEMA = 1


def write_report_file(path: str | os.PathLike, content: dict) -> None:
    """Write the report of a check; see write_output."""
    write_output(path, json.dumps(content, indent=1, allow_nan=False) + "\n", "report.json")


def report_content(settings: dict, reports: dict[str, tuple[list[str], Report]], reason: str | None) -> dict:
    """Return the report of a check. reason: why the run would stop before its first step; None if it would not.

    settings: flags that the result depends on. reports: paths and report of "train" and "eval", of those that could be
    opened.
    """
    return {
        "schema": SCHEMA,
        "llava_lite": __version__,
        "would_train": reason is None,
        "reason": reason,
        "settings": settings,
        "files": {name: _files(paths, report) for name, (paths, report) in reports.items()},
    }


def _files(paths: list[str], report: Report) -> dict:
    annotations, lengths = report.annotations, report.lengths
    half, most = np.percentile(lengths, (50, 95), method="lower").tolist() if len(lengths) else (0, 0)
    return {
        "paths": [os.path.abspath(path) for path in paths],
        "records": report.num_records + len(report.bad),
        "usable": report.num_records,
        "with_images": report.num_with_image,
        "text_only": report.num_records - report.num_with_image,
        "images": int(annotations.num_images.sum()),
        "tokens": report.num_tokens,
        "tokens_before_truncation": int(lengths.sum(dtype=np.int64)),
        "supervised_tokens": int(annotations.token_facts().num_supervised.sum(dtype=np.int64)),
        "tokens_p50": int(half),
        "tokens_p95": int(most),
        "longest": _longest(report),
        "truncated": report.num_truncated,
        "empty_answers": int(report.empty_answers.sum()),
        "other_suffix": report.num_other_suffix,
        "placeholder_as_text": int((report.text_placeholders > 0).sum()),
        "special_tokens_in_texts": report.texts.num_special,
        "bad": len(report.bad),
        "bad_by_kind": dict(sorted(Counter(bad.kind for bad in report.bad).items())),
        "bad_records": [
            {
                "file": os.path.abspath(bad.file),
                "place": bad.position,
                "id": bad.id,
                "kind": bad.kind,
                "reason": bad.reason,
                "path": bad.path,
            }
            for bad in report.bad
        ],
    }


def _longest(report: Report) -> dict | None:
    if not len(report.lengths):
        return None
    i = int(report.lengths.argmax())
    file, place = report.annotations.place(i)
    found = {"file": os.path.abspath(file.source.path), "place": place, "id": report.annotations[i].id}
    return found | {"tokens": int(report.lengths[i])}
