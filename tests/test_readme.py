"""The README: short, opens with what it makes, explains its words, and promises what there is."""

import re

import pytest
from pages import README, ROOT, blocks, commands
from PIL import Image

TEXT = README.read_text(encoding="utf-8")


def test_has_at_most_150_lines():
    assert len(TEXT.splitlines()) <= 150


def test_opens_with_the_figure_and_the_two_commands():
    assert blocks(README, "bash")[0].splitlines() == ["bash scripts/quickstart.sh", "bash scripts/test.sh"]
    head = TEXT.split("```bash")[0]
    assert len(head.splitlines()) < 12
    (figure,) = re.findall(r"!\[[^\]]{20,}\]\(([^)]+)\)", head)
    assert (ROOT / figure).stat().st_size < 150_000
    with Image.open(ROOT / figure) as image:
        assert image.width >= 1000


def test_three_figures_have_their_machine_date_and_versions():
    after = TEXT.split("bash scripts/test.sh\n```\n", 1)[1]
    (row,) = re.findall(r"\n\| ([\d.]+%) \| ([\d.]+%) \| ([\d,]+ s) \|\n", after)
    assert len(row) == 3
    for word in (r"2 cores of", r"20\d\d-\d\d-\d\d", r"torch \d", r"transformers \d", r"DeepSpeed \d"):
        assert re.search(word, after.split("\n## ")[0]), word


@pytest.mark.parametrize(
    ("word", "explained"),
    [
        ("experts", "*experts*: every other MLP becomes four copies of itself"),
        ("router", "a *router* sends each token to two of them"),
        ("supervised", "*supervised*, which means counted in the loss"),
        ("template", "A *template* is the text around questions and answers"),
        ("ZeRO", "*ZeRO* is DeepSpeed's way to divide the state of training among GPUs"),
        ("vision encoder", "A *vision encoder* turns an image into features"),
        ("connector", "A *connector* maps them to the width of a *language model*"),
    ],
)
def test_a_word_is_explained_where_it_first_stands(word, explained):
    assert explained in TEXT
    first = re.search(rf"(?<!\w){word}", TEXT).start()
    assert TEXT.index(explained) <= first <= TEXT.index(explained) + len(explained)


def test_paths_of_the_quickstart_are_those_that_it_writes():
    script = (ROOT / "scripts/quickstart.sh").read_text(encoding="utf-8")
    files = ("make_world.py", "scene_records.py")
    world = "".join((ROOT / "playground/tiny" / name).read_text(encoding="utf-8") for name in files)
    assert "OUT=quickstart" in script
    used = [word for command in commands(README) for word in command.words if word.startswith("quickstart/")]
    assert set(used) == {"quickstart/stage2", "quickstart/stage3", "quickstart/data/held_out/images/digit_0000.png"}
    for stage in ("stage2", "stage3"):
        assert f"OUTPUT=$OUT/{stage}" in script
    assert '--out "$OUT/data"' in script
    assert 'f"images/{kind}_{i:04d}.png"' in world
    assert 'out / "held_out"' in world


def test_extras_are_those_of_the_package():
    tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml; Python 3.11 has a reader, 3.10 has none")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = re.search(r"\nExtras: (.*?)\. Without", TEXT, re.DOTALL).group(1)
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(project["optional-dependencies"])
    assert project["readme"] == "README.md"


def test_citation_names_the_version_and_the_licence():
    import llava_lite

    assert f"version = {{{llava_lite.__version__}}}" in TEXT
    assert "[Apache-2.0](LICENSE)" in TEXT


def test_says_what_a_7b_run_takes_or_that_it_was_not_measured():
    section = TEXT.split("What a 7B run takes", 1)[1].split("\n## ")[0]
    for subject in ("hours", "memory", "quality"):
        (row,) = [line for line in section.splitlines() if line.startswith("| ") and subject in line]
        assert "not measured" in row
