"""A run as files, for the page that is made of them."""

import json
from html.parser import HTMLParser

import pytest


def write_lines(path, lines):
    """Write a file of JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def run_dir(tmp_path):
    """Return a function: lines of metrics.jsonl, and files with their content -> the directory of a run."""

    def make(lines=(), name="my run", **files):
        directory = tmp_path / name
        directory.mkdir(parents=True)
        if lines:
            write_lines(directory / "metrics.jsonl", lines)
        for stem, content in files.items():
            if isinstance(content, dict):
                (directory / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
            else:
                write_lines(directory / f"{stem}.jsonl", content)
        return directory

    return make


@pytest.fixture
def page_text():
    """Return a function: the markup of a page -> its text, with a line for each element."""

    class Texts(HTMLParser):
        def __init__(self):
            super().__init__()
            self.texts = []

        def handle_data(self, data):
            self.texts.append(data)

    def read(markup):
        parser = Texts()
        parser.feed(markup)
        return "\n".join(parser.texts)

    return read
