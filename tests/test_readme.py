"""The README: its commands run, its flags parse, its links lead somewhere, its tables say what the code has."""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def blocks(language):
    """Return the code blocks of a language, long commands on one line."""
    found = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return [block.replace("\\\n", " ") for block in found]


def commands(pattern):
    """Return the shell lines of the README that a pattern matches."""
    lines = [line.strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if re.search(pattern, line)]


def table(heading, column=0):
    """Return the words in backquotes in a column of the table whose first line starts with `heading`."""
    rows = README.split(f"\n| {heading} ", 1)[1].split("\n\n")[0].splitlines()[2:]
    return [word for row in rows for word in re.findall(r"`([^`]+)`", row.split("|")[1 + column])]


def test_opens_with_the_two_commands():
    assert blocks("bash")[0].splitlines() == ["bash scripts/quickstart.sh", "bash scripts/test.sh"]
    assert len(README.split("```bash")[0].splitlines()) < 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_links_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^):]+)\)", text)
    named += re.findall(
        r"(?<![\w/.])((?:scripts|tests|playground)/[\w./-]*\w\.\w+|zero\d\.json|constraints[\w.-]*\.txt)", text
    )
    written_by_the_reader = {"scripts/hostfile"}
    missing = [name for name in named if name not in written_by_the_reader and not (ROOT / name).exists()]
    assert missing == []


@pytest.mark.parametrize("command", commands(r"bash scripts/v1_5/"))
def test_recipe_command_parses(command, tmp_path):
    from llava_lite.arguments import parse_args

    for name in ("deepspeed", "torchrun", "accelerate"):
        echo = tmp_path / name
        echo.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
        echo.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    flags = json.loads(done.stdout)
    flags = flags[flags.index("--deepspeed") + 2 :]
    assert parse_args([*flags, "--use_cpu", "True"])[2].tuning in ("projector", "full", "lora", "moe")


@pytest.mark.parametrize("command", commands(r"^llava-lite (?!train)"))
def test_verb_and_its_flags_exist(command):
    from llava_lite.cli import VERBS

    _, verb, *arguments = shlex.split(command)
    assert verb in VERBS
    done = subprocess.run(
        [sys.executable, "-m", "llava_lite.cli", verb, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for flag in (word for word in arguments if word.startswith("--")):
        assert flag in done.stdout


@pytest.mark.parametrize("block", blocks("python"))
def test_snippet_uses_public_names(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_variables_are_those_that_the_scripts_read():
    scripts = "".join(path.read_text() for path in [*ROOT.glob("scripts/lib/*.sh"), *ROOT.glob("scripts/v1_5/*.sh")])
    named = table("variable")
    assert named
    assert [name for name in named if f"${{{name}:-" not in scripts] == []


def test_tables_name_every_backbone_and_tower():
    from llava_lite.conversation import conv_templates
    from llava_lite.model import BACKBONES
    from llava_lite.model.vision_tower import TOWERS

    assert table("model_type") == list_of(BACKBONES, table("model_type"))
    assert table("model_type", 1) == [BACKBONES[name].__name__ for name in table("model_type")]
    assert set(table("model_type", 3)) <= set(conv_templates)
    assert table("tower", 1) == list_of(TOWERS, table("tower", 1))


def test_names_of_the_originals_open_under_the_alias():
    named = table("of", 1)
    modules, methods = [name for name in named if "." in name], [name for name in named if "." not in name]
    assert len(modules) > 20
    for name in modules:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(f"llava_lite.{module}"), attribute), name
    from llava_lite.model import LlavaLlamaForCausalLM

    assert [name for name in methods if not hasattr(LlavaLlamaForCausalLM, name)] == []


def test_every_format_names_the_tests_that_open_it():
    from llava_lite.formats import FORMATS

    rows = README.split("\n| checkpoint |", 1)[1].split("\n\n")[0].splitlines()[2:]
    tests = {name for row in rows for name in re.findall(r"`(tests/[^`]+)`", row)}
    assert all((ROOT / name).is_file() for name in tests)
    opened = "".join((ROOT / name).read_text(encoding="utf-8") for name in tests)
    for word in ("from_pretrained", "load_pretrained_model"):
        assert word in opened
    assert set(FORMATS) == {"llava", "moe_llava", "transformers_llava"}, "a new format needs a row and its test"


def list_of(registry, order):
    """Return the keys of a registry in the order of a table, those that the table lacks at the end."""
    return sorted(registry, key=lambda name: order.index(name) if name in order else len(order))


def test_stages_name_every_recipe_with_its_rate():
    scripts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in ROOT.glob("scripts/v1_5/*.sh")}
    assert set(table("stage", 1)) == set(scripts)
    for row in README.split("\n| stage ", 1)[1].split("\n\n")[0].splitlines()[2:]:
        cells = [cell.strip() for cell in row.split("|")]
        assert f"--learning_rate {cells[5]}" in scripts[cells[2].strip("`")]
