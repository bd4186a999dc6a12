"""The reference pages of flags, config keys and benchmarks are what docs/generate.py makes of the code, all of it."""

import dataclasses
import re
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from llava_lite.configuration import LlavaConfigMixin
from llava_lite.model.moe.config import MoeConfig
from llava_lite.train.arguments.fields import DataArguments, ModelArguments, TrainingArguments

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = (ModelArguments, DataArguments, TrainingArguments)
PINNED = re.search(r"^transformers==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]


@pytest.fixture(scope="module")
def generate():
    """The program that writes the pages, as a module."""
    spec = spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(version("transformers") != PINNED, reason=f"the pages are those of transformers {PINNED}")
@pytest.mark.parametrize("name", ["flags.md", "config.md", "benchmarks.md"])
def test_page_is_what_the_code_says(name, generate):
    page = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert page == generate.pages()[name], "the page is out of date; run: python docs/generate.py"


def rows(page):
    """Return {first cell: cells} of the tables of a page."""
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0].strip("`"): row for row in cells}


def test_every_flag_stands_once_with_what_it_takes_and_a_sentence(generate):
    page = generate.flags_page()
    flags = {f"--{field.name}" for cls in ARGUMENTS for field in dataclasses.fields(cls) if field.init}
    listed = rows(page.split("## Flags of LLaVA")[0])
    assert set(listed) == flags
    for name, (_, takes, _, meaning, *_) in listed.items():
        assert takes, name
        assert len(meaning.split()) > 1, name
    # Ours begin with a capital or with the value that they explain, and end.
    own = rows(page.split("## Transformers' flags")[0])
    assert [name for name, row in own.items() if not row[3].endswith(".")] == []


def test_defaults_and_recipes_are_those_of_the_code(generate):
    listed = rows(generate.flags_page())
    assert listed["--router_aux_loss_coef"][2] == "`0.01`"
    assert listed["--bits"][1] == "`4`, `8`, `16`"
    # LLaVA-1.5 and MoE-LLaVA, as published.
    assert listed["--learning_rate"][4] == "1: `1e-3`; 2, 3: `2e-5`; LoRA: `2e-4`"
    assert listed["--deepspeed"][4] == "1, 3: `zero2.json`; 2, LoRA: `zero3.json`"
    assert listed["--output_dir"][4] == "all: *path*"


def test_every_config_key_stands_with_its_default_and_a_sentence(generate):
    listed = rows(generate.config_page().split("## Classes")[0])
    keys = {field.name for cls in (LlavaConfigMixin, MoeConfig) for field in dataclasses.fields(cls)} - {"layers"}
    assert set(listed) == keys
    assert [name for name, row in listed.items() if not row[3].endswith(".")] == []
    assert listed["image_token_index"][1:3] == ["integer", "`-200`"]
    assert listed["mm_projector_type"][2] == '`"linear"`'
    assert listed["moe"][1:3] == ["dict or null", "`null`"]
