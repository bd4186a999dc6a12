"""The six places and the table of parts name files and functions that exist."""

import ast
import re

import pytest
from pages import ROOT, quoted, rows

CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PLACES = rows(CONTRIBUTING, "question")
PARTS = rows(CONTRIBUTING, "to add")
TREE = CONTRIBUTING.read_text(encoding="utf-8").split("```text\n", 1)[1].split("```", 1)[0]


def names_in(path):
    """Return the names that a file defines: functions, classes, methods, and what it assigns at the top."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    return defined | {target.id for target in targets if isinstance(target, ast.Name)}


def test_the_six_questions_are_there():
    subjects = [
        "image become features",
        "record become labels",
        "routed",
        "checkpoint opened",
        "save",
        "add an encoder",
    ]
    assert len(PLACES) == len(subjects)
    for subject, row in zip(subjects, PLACES, strict=True):
        assert subject in row[0]


@pytest.mark.parametrize("row", PLACES, ids=lambda row: row[0])
def test_files_and_functions_of_a_place_exist(row):
    files = [ROOT / name for cell in row for name in quoted(cell) if name.endswith(".py")]
    assert files
    package = [path.parent / "__init__.py" for path in files if (path.parent / "__init__.py").is_file()]
    defined = set().union(*map(names_in, [*files, *package]))
    named = {name for name in quoted(row[2]) if not name.endswith(".py")}
    assert named
    assert named <= defined


@pytest.mark.parametrize("row", PARTS, ids=lambda row: row[0])
def test_directories_files_and_registries_of_a_part_exist(row):
    paths = [name for cell in row[1:] for name in quoted(cell) if "/" in name]
    assert paths
    for name in paths:
        directory = ROOT / name.split("<", 1)[0]
        assert (ROOT / name).is_file() or (
            directory if name.split("<", 1)[0].endswith("/") else directory.parent
        ).is_dir()
    registries = [name for cell in row[1:] for name in quoted(cell) if re.fullmatch(r"[A-Z]+", name)]
    files = [ROOT / name for name in paths if name.endswith(".py") and "<" not in name]
    for name in registries:
        assert any(name in names_in(path) for path in files), name


def test_tree_names_every_directory_of_the_package_and_nothing_else():
    package = ROOT / "llava_lite"
    listed = set(re.findall(r"(?m)(?<![\w/])(\w+)/", TREE.split("scripts/", 1)[0]))
    top = {path.name for path in package.iterdir() if (path / "__init__.py").is_file()}
    inside = {path.name for name in ("model", "train") for path in (package / name).iterdir() if path.is_dir()}
    assert top <= listed
    assert listed - {"llava_lite"} <= top | inside | {"__pycache__"}
    assert inside - {"__pycache__"} <= listed
