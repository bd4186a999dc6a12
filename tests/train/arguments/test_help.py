"""The help page of `llava-lite train`."""

import dataclasses
import re

import transformers

from llava_lite.train.arguments.fields import DataArguments, ModelArguments, TrainingArguments
from llava_lite.train.arguments.help import FlagParser


def page():
    return FlagParser((ModelArguments, DataArguments, TrainingArguments)).format_help()


def test_every_flag_is_listed_once_and_ours_come_first():
    text = page()
    listed = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    fields = [f.name for cls in (ModelArguments, DataArguments, TrainingArguments) for f in dataclasses.fields(cls)]
    assert {name for name in fields if not name.startswith("_")} - set(listed) <= {"local_rank"}
    assert len(set(listed)) == len(listed)
    theirs = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
    redefined = {name for name in theirs if name in TrainingArguments.__annotations__}
    last_of_ours = max(listed.index(name) for name in listed if name in fields and name not in theirs - redefined)
    first_of_theirs = min(listed.index(name) for name in listed if name in theirs - redefined)
    assert last_of_ours < first_of_theirs


def test_sections_are_in_the_order_in_which_a_person_asks():
    titles = re.findall(r"^(\w.*):$", page(), re.MULTILINE)
    assert titles == ["model", "data", "training", "the Trainer of transformers"]


def test_choices_and_defaults_are_shown_and_no_default_of_none():
    text = page()
    entry = text.split("\n  --bad_record ", 1)[1].split("\n  --")[0]
    assert entry.startswith("{raise,skip} ")
    assert entry.endswith("(default: raise)")
    assert "(default: None)" not in text
