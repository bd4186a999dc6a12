"""YAML of strangers: bombs end at once with file, line and reason, and plain files are read as by PyYAML."""

import resource

import pytest
import yaml

from llava_lite.data.errors import DataError
from llava_lite.data.index.mixtures import read_mixture
from llava_lite.hub.card import read_front_matter
from llava_lite.hub.yaml_files import UnreadableYAML, read_yaml
from llava_lite.train.arguments.legacy import yaml_flags

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 40))
MERGES = "a0: &a0 {x0: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}], x{i}: 1}}\n" for i in range(1, 60))
BOMBS = {
    "aliases of aliases": (LAUGHS, r", line 6, column \d+ is not YAML: more than 100,000 values, those of aliases"),
    "merged keys": (MERGES, r", line \d+, column \d+ is not YAML: more than 100,000 values"),
    "an alias inside itself": ("a: &a [1, *a]\n", r", line 1, column 11 .*the alias 'a' stands inside what it names"),
    "flow lists": ("a: " + "[" * 100_000, r", line 1, column 35 is not YAML: nested more than 32 deep"),
    "block lists": ("- " * 50_000 + "x", r", line 1, column 65 is not YAML: nested more than 32 deep"),
    "nested keys": ("? " * 50_000 + "x", r"nested more than 32 deep"),
    "a number of base 60": ("a: 1" + ":1" * 200_000, r", line 1, column 4 .*a number of 400,001 characters"),
    "a number": ("a:\n  b: " + "9" * 900_000, r", line 2, column 6 .*a number of 900,000 characters"),
    "a fraction": ("a: 1" + ":1" * 200_000 + ".5", r"a number of 400,003 characters"),
    "a megabyte and more": ("# " + "x" * 2**20, r"has 1,048,578 bytes; a YAML file may have 1,048,576"),
    "a key twice": ("a: 1\nb: 2\na: 3\n", r", line 3, column 1 is not YAML: the key 'a' stands twice"),
    "a tag of Python": ("a: !!python/object/apply:os.mkdir [/tmp/ran]", r", line 1, column 4 .*could not determine"),
    "a date that is none": ("a: 2026-02-31\n", r"is not YAML: day is out of range"),
    "not UTF-8": (b"a: \xff\n", r"byte 3 is not UTF-8"),
    "a control character": ("a: \x00\n", r"is not YAML: unacceptable character #x0000"),
    "a list as a key": ("? [a]\n: 1\n", r", line 1, column 3 is not YAML: found unhashable key"),
    "two documents": ("a: 1\n---\nb: 2\n", r", line 2, column 1 is not YAML: but found another document"),
}


def write(directory, content):
    path = directory / "bomb.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_ends_with_file_line_and_reason(name, tmp_path):
    content, message = BOMBS[name]
    path = write(tmp_path, content)
    for read, kind in ((read_yaml, UnreadableYAML), (yaml_flags, UnreadableYAML), (read_mixture, DataError)):
        with pytest.raises(kind, match=rf"^{path}.*{message}"):
            read(str(path))


def test_a_bomb_takes_no_memory(tmp_path):
    for name in ("aliases of aliases", "merged keys"):
        with pytest.raises(UnreadableYAML):
            read_yaml(write(tmp_path, BOMBS[name][0]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20, "KiB"


def test_a_card_with_a_bomb_has_no_metadata(tmp_path):
    card = write(tmp_path, f"---\n{LAUGHS}---\n# Model\n")
    assert read_front_matter(card) == ({}, "# Model\n")
    card.write_text("---\nlicense: mit\n---\n# Model\n")
    assert read_front_matter(card) == ({"license": "mit"}, "# Model\n")


def test_plain_files_are_read_as_by_pyyaml(tmp_path):
    text = (
        "\ufeffbase: &base {lr: 2.0e-5, steps: 1_000, when: 2026-01-31, at: 12:30, none: ~, yes: true, hex: 0x1f}\n"
        "run:\n  <<: *base\n  lr: 1e-3\n  tags: !!set {a, b}\nlist:\n- *base\n- 'text: one'\n- |\n  lines\n  of text\n"
        "entries: [" + ", ".join(f"{{json_path: {i}.json}}" for i in range(5000)) + "]\n"
    )
    assert read_yaml(write(tmp_path, text)) == yaml.safe_load(text.removeprefix("\ufeff"))


def test_flags_have_names(tmp_path):
    with pytest.raises(ValueError, match="3 is no name of a flag"):
        yaml_flags(write(tmp_path, "3: 4\n"))
    with pytest.raises(FileNotFoundError, match="there is no YAML file"):
        yaml_flags(tmp_path / "none.yaml")
