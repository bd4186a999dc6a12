"""The page about testing names every directory of tests, every marker, and places that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")


def test_every_directory_of_tests_has_a_promise():
    named = set(re.findall(r"^\| `tests/([\w]+)` \|", PAGE, re.MULTILINE))
    there = {path.name for path in (ROOT / "tests").iterdir() if any(path.rglob("test_*.py"))}
    assert named == there


def test_every_marker_is_explained():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    markers = re.findall(r'"(\w+): ', text.split("markers = [")[1].split("]")[0])
    assert markers
    assert [name for name in markers if f"`{name}` marks" not in PAGE] == []


def test_places_exist():
    named = set(
        re.findall(r"`((?:tests|scripts|benchmarks|llava_lite)/[\w./-]*)`|`(\.ci/run|constraints\.txt)`", PAGE)
    )
    paths = {one or other for one, other in named} - {"tests/a/test_b.py", "llava_lite/a/b.py"}
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_part_that_can_be_added_has_its_tests():
    to_add = re.findall(r"^\| ([a-z ]+?) \| ", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    wanted = {"vision encoder", "connector", "backbone", "conversation template", "checkpoint format", "recipe"}
    assert wanted <= set(to_add)
    for part in wanted | {"benchmark", "record format", "tuning"}:
        assert f"\n| {part} | " in PAGE
