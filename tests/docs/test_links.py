"""Links, images and file names on the pages lead somewhere."""

import re

import pytest
from pages import DOCS, PAGES, README, ROOT, name_of

# What the reader makes: outputs of commands, and files of the reader's own.
MADE_BY_THE_READER = ("scripts/hostfile",)
REPOSITORY_PATH = re.compile(
    r"(?<![\w/.-])((?:scripts|tests|docs|benchmarks|playground|llava_lite)/[\w./-]*\w\.\w+|zero\d\.json|constraints[\w.-]*\.txt)"
)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page):
    named = REPOSITORY_PATH.findall(page.read_text(encoding="utf-8"))
    outside = ("docs/modeling_", "scripts/v1/")
    missing = [name for name in named if name not in MADE_BY_THE_READER and not (ROOT / name).exists()]
    assert [name for name in missing if not name.startswith(outside)] == []


@pytest.mark.parametrize("page", [README, *DOCS], ids=name_of)
def test_anchors_exist(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s:]*)#([\w-]+)\)", text):
        other = (page.parent / target) if target else page
        headings = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {slug(heading) for heading in headings}, f"{name_of(page)}: {target}#{anchor}"


def slug(heading) -> str:
    """Return the anchor of a heading, as GitHub and mkdocs make it."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def test_every_page_is_in_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r": ([\w/]+\.md)$", config, re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in DOCS)
