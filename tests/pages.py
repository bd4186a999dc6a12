"""The pages of the documentation as data: their code blocks, shell commands and tables."""

import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS, *sorted((ROOT / "playground").rglob("README.md"))]
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_ASSIGNMENT = re.compile(r"[A-Z_]+=")


class Command(NamedTuple):
    """One command of a bash block: the page it is on, its variables, and its words."""

    page: Path
    variables: dict[str, str]
    words: list[str]

    def __str__(self):
        return f"{self.page.name}: {shlex.join(self.words)}"


def name_of(page) -> str:
    """Return the path of a page in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page, language) -> list[str]:
    """Return the code blocks of a language on a page."""
    text = page.read_text(encoding="utf-8")
    return [textwrap.dedent(body) for _, kind, body in _FENCE.findall(text) if kind == language]


def commands(page) -> list[Command]:
    """Return the commands of all bash blocks of a page; `a && b` is two."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word not in ("&&", ";", "|"):
                    words.append(word)
                    continue
                num_set = next((i for i, one in enumerate(words) if not _ASSIGNMENT.match(one)), len(words))
                variables = dict(one.split("=", 1) for one in words[:num_set])
                if words[num_set:]:
                    found.append(Command(page, variables, words[num_set:]))
                words = []
    return found


def all_commands(*program) -> list[Command]:
    """Return the commands of all pages that begin with these words."""
    every = [command for page in PAGES for command in commands(page)]
    return [command for command in every if command.words[: len(program)] == list(program)]


def rows(page, heading) -> list[list[str]]:
    """Return the cells of the rows below the table head that starts with `heading`."""
    text = page.read_text(encoding="utf-8").split(f"\n| {heading} ", 1)[1]
    lines = re.split(r"\n(?!\|)", text, maxsplit=1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in lines]


def quoted(cell) -> list[str]:
    """Return what stands in backquotes in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def column(page, heading, index=0) -> list[str]:
    """Return what stands in backquotes in a column of the table that starts with `heading`."""
    return [word for row in rows(page, heading) for word in quoted(row[index])]
