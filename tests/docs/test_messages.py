"""Every message that the troubleshooting page quotes is one that the source writes."""

import ast
import re

import pytest
from pages import ROOT, blocks

PAGE = ROOT / "docs/troubleshooting.md"
MESSAGES = [line for block in blocks(PAGE, "text") for line in block.splitlines()]


def texts_of(path):
    """Yield the texts of a Python file, a NUL where a value is written into one."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


@pytest.fixture(scope="module")
def texts():
    """Return every text of the package, and the lines of the shell scripts."""
    found = [text for path in (ROOT / "llava_lite").rglob("*.py") for text in texts_of(path)]
    scripts = [path.read_text(encoding="utf-8") for path in (ROOT / "scripts").rglob("*.sh")]
    return found + [line for script in scripts for line in script.splitlines()]


@pytest.mark.parametrize("message", MESSAGES)
def test_quoted_message_is_in_the_source(message, texts):
    pieces = [piece.strip() for piece in message.split("...")]
    fixed = [piece for piece in pieces if piece]
    assert sum(map(len, fixed)) >= 10, "too little to find it by"
    pattern = re.compile(".*?".join(map(re.escape, fixed)), re.DOTALL)
    assert any(pattern.search(text) for text in texts)


def test_every_message_has_a_cause_and_a_remedy():
    text = PAGE.read_text(encoding="utf-8")
    assert text.count("```text\n") == text.count("**Cause:**") == text.count("**Remedy:**")
