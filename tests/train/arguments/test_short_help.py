"""The first page of help of `llava-lite train`: its flags exist, its defaults are true, and it costs no torch."""

import dataclasses
import re
import subprocess
import sys

import pytest

from llava_lite.cli import main
from llava_lite.train.arguments.fields import DataArguments, ModelArguments, TrainingArguments
from llava_lite.train.arguments.short_help import MAIN_FLAGS, asks_for_help, main_page

FLAGS = [(flag.split()[0].lstrip("-"), words) for flags in MAIN_FLAGS.values() for flag, words in flags]
FIELDS = {f.name: f for cls in (ModelArguments, DataArguments, TrainingArguments) for f in dataclasses.fields(cls)}


@pytest.mark.parametrize(("name", "words"), FLAGS)
def test_flag_exists_and_its_default_is_true(name, words):
    assert name in FIELDS
    reported = re.search(r"default: ([\w.-]+)$", words)
    default = FIELDS[name].default
    default = getattr(default, "value", default)
    if reported is None:
        # What depends on the model or the device, what is needed, and what is nothing.
        assert default in (None, -1, 0.0) or "default: " in words
    elif reported[1] in ("full", "none"):
        # Of flags whose None means that.
        assert default in (None, "none")
    elif name == "num_experts":
        assert ModelArguments().moe_config()["num_experts"] == [int(reported[1])]
    else:
        assert str(default) == reported[1] or float(default) == float(reported[1])


def test_about_thirty_flags_stand_once_under_a_heading_each():
    names = [name for name, _ in FLAGS]
    assert 30 <= len(names) == len(set(names)) <= 36
    listed = re.findall(r"^  --(\w+)", main_page(), re.MULTILINE)
    assert listed == names
    assert all(f"\n{title}:\n" in main_page() for title in MAIN_FLAGS)
    assert max(map(len, main_page().splitlines())) < 120


@pytest.mark.parametrize(
    ("argv", "page"),
    [
        (["--help"], "main"),
        (["-h"], "main"),
        (["--help", "all"], "all"),
        (["--output_dir", "x", "--help", "all"], "all"),
        (["--help", "--output_dir"], "main"),
        (["--output_dir", "x"], None),
        ([], None),
    ],
)
def test_help_is_asked_for_in_two_ways(argv, page):
    assert asks_for_help(argv) == page


def test_first_page_costs_no_torch():
    code = (
        "import sys\nfrom llava_lite.cli import main\nmain(['train', '--help'])\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{main_page()}[]\n", done.stderr


def test_all_of_help_lists_every_flag(capsys):
    main(["train", "--help", "all"])
    page = capsys.readouterr().out
    listed = set(re.findall(r"^  --(\w+)", page, re.MULTILINE))
    assert {name for name, field in FIELDS.items() if field.init and not name.startswith("_")} - listed <= {
        "local_rank"
    }
    assert page.startswith("usage: llava-lite train ")
