"""The tables of the pages agree with the code and the scripts."""

import importlib
import re
from functools import cache

import pytest
from pages import PAGES, ROOT, column, name_of, rows

TRAINING = ROOT / "docs/training.md"
CHECKPOINTS = ROOT / "docs/checkpoints.md"
# mkdocs, deepspeed, docker, hf, LLaVA's own programs, lmms-eval and VLMEvalKit.
OF_OTHER_PROGRAMS = (
    "--strict",
    "--api-key",
    "--host",
    "--port",
    "--module",
    "--build-arg",
    "--gpus",
    "--ipc",
    "--network",
    "--rm",
    "--query",
    "--question-file",
    "--config",
    "--force_simple",
    "--include_path",
    "--log_samples",
    "--model_args",
    "--local-dir",
    "--output_path",
    "--repo-type",
    "--tasks",
)
# Generated from the code, with the flags that are refused; tests/docs/test_reference.py compares them.
GENERATED = sorted((ROOT / "docs/reference").glob("*.md"))


def test_variables_are_those_that_the_scripts_read():
    scripts = "".join(path.read_text() for path in [*ROOT.glob("scripts/lib/*.sh"), *ROOT.glob("scripts/v1_5/*.sh")])
    named = column(TRAINING, "variable")
    assert named
    assert [name for name in named if f"${{{name}:-" not in scripts] == []


def test_backbones_are_those_of_the_registry():
    from llava_lite.conversation import conv_templates
    from llava_lite.model import BACKBONES

    named = column(TRAINING, "model_type")
    assert sorted(named) == sorted(BACKBONES)
    assert column(TRAINING, "model_type", 1) == [BACKBONES[name].__name__ for name in named]
    assert set(column(TRAINING, "model_type", 3)) <= set(conv_templates)


def test_encoders_are_those_of_the_registry():
    from llava_lite.model.encoders import TOWERS

    assert sorted(column(TRAINING, "encoder", 1)) == sorted(TOWERS)


def test_stages_name_every_recipe_with_its_rate():
    scripts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in ROOT.glob("scripts/v1_5/*.sh")}
    stages = rows(TRAINING, "stage")
    # Those of other systems stand on their own pages.
    pages = "".join((ROOT / f"docs/{name}.md").read_text() for name in ("llama_adapter", "imagebind_llm", "accessory"))
    named = set(re.findall(r"\w+_\w+\.sh", pages))
    others = {name for name in scripts if name.rpartition("/")[2] in named}
    assert {row[1].strip("`") for row in stages} == set(scripts) - others
    for row in stages:
        assert f"--learning_rate {row[4].strip(chr(96))}" in scripts[row[1].strip("`")]


def test_names_of_the_originals_open_under_the_alias():
    named = column(ROOT / "docs/in_place_of_llava.md", "of", 1)
    modules, methods = [name for name in named if "." in name], [name for name in named if "." not in name]
    assert len(modules) > 20
    for name in modules:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(f"llava_lite.{module}"), attribute), name
    from llava_lite.model import LlavaLlamaForCausalLM

    assert [name for name in methods if not hasattr(LlavaLlamaForCausalLM, name)] == []


def test_every_checkpoint_format_names_the_tests_that_open_it():
    from llava_lite.formats import FORMATS

    tests = set(column(CHECKPOINTS, "checkpoint", 2))
    assert all((ROOT / name).is_file() for name in tests)
    opened = "".join((ROOT / name).read_text(encoding="utf-8") for name in tests)
    for word in ("from_pretrained", "load_pretrained_model"):
        assert word in opened
    assert len(FORMATS) == 3, "a new format needs a row and its test"


def test_extras_are_those_of_the_package():
    tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml; Python 3.11 has a reader, 3.10 has none")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(column(ROOT / "docs/getting_started.md", "extra")) == sorted(project["optional-dependencies"])


@pytest.mark.parametrize("page", [page for page in PAGES if page not in GENERATED], ids=name_of)
def test_flags_that_a_page_names_exist(page):
    text = re.sub(r"\(was `[^`]+`\)", "", page.read_text(encoding="utf-8"))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", re.sub(r"```(?!bash).*?```", "", text, flags=re.DOTALL)))
    unknown = sorted(flag for flag in named if flag.replace("-", "_") not in known_flags())
    assert [flag for flag in unknown if flag not in OF_OTHER_PROGRAMS] == []


@cache
def known_flags():
    """Return every flag of the package and its scripts, with underscores."""
    from llava_lite.commands.verbs import PARSERS
    from llava_lite.train.arguments import legacy, parse

    parsers = [parse.build_parser(), *(importlib.import_module(name).build_parser() for name in PARSERS.values())]
    parsers.append(importlib.import_module("llava_lite.commands.data").build_parser())
    flags = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    flags |= {f"--{name}" for name in (*legacy.RENAMED, *legacy.TRANSLATED, *legacy.WITHOUT_EFFECT)}
    programs = [*(ROOT / "scripts").rglob("*.sh"), *(ROOT / "playground").rglob("*.py")]
    flags |= {flag for path in programs for flag in re.findall(r"--[a-z][\w-]*", path.read_text(encoding="utf-8"))}
    return {flag.replace("-", "_") for flag in flags}
