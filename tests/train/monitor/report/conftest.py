"""A run as files, for the page that is made of them."""

import json

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
