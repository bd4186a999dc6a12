"""Read YAML, which may be anybody's, within bounds of size, depth and numbers: the one place that reads it."""

from __future__ import annotations

from pathlib import Path

import yaml

# PyYAML reads a megabyte in some seconds; a mixture of ten thousand files has one.
LARGEST_BYTES = 2**20
DEEPEST = 32
# Values of a file, those of an alias counted wherever it stands: ten aliases of ten aliases are a hundred values.
MOST_VALUES = 100_000
# Characters of a number; in base 60, which YAML has too, a long one takes minutes.
LONGEST_NUMBER = 64


class UnreadableYAML(ValueError):
    """A file is no YAML, or exceeds a bound; the message names file, line, column and reason."""


def read_yaml(path):
    """Return what a YAML file holds: mappings, lists and plain values; raises UnreadableYAML, OSError for no file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no YAML file {str(path)!r}.")
    num_bytes = path.stat().st_size
    if num_bytes > LARGEST_BYTES:
        raise UnreadableYAML(f"{path} has {num_bytes:,} bytes; a YAML file may have {LARGEST_BYTES:,}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableYAML(f"{path} is not YAML: byte {error.start} is not UTF-8 ({error.reason}).") from None
    return parse_yaml(text, path)


def parse_yaml(text: str, path):
    """Return what a text of YAML holds, as read_yaml does; path: of its file, for messages."""
    try:
        return yaml.load(text, Loader=_BoundedLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UnreadableYAML(f"{path}{place} is not YAML: {error.problem or error.context}.") from None
    # ValueError: a date that does not exist, a number with too many digits.
    except (yaml.YAMLError, ValueError) as error:
        raise UnreadableYAML(f"{path} is not YAML: {' '.join(str(error).split())[:300]}.") from None


class _BoundedLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which makes plain values alone, with bounds and without repeated keys."""

    def __init__(self, stream):
        super().__init__(stream)
        self.depth, self.num_values, self.sizes = 0, 0, {}

    def compose_node(self, parent, index):
        event = self.peek_event()
        before = self.num_values
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"nested more than {DEEPEST} deep", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if node not in self.sizes:
                raise yaml.MarkedYAMLError(
                    problem=f"the alias {event.anchor!r} stands inside what it names", problem_mark=event.start_mark
                )
            self.num_values += self.sizes[node]
        else:
            self.num_values += 1
            self.sizes[node] = self.num_values - before
        if self.num_values > MOST_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MOST_VALUES:,} values, those of aliases counted", problem_mark=event.start_mark
            )
        return node

    def construct_mapping(self, node, deep=False):
        if isinstance(node, yaml.MappingNode):
            # Before keys are merged (<<), which may be replaced.
            seen = set()
            for key, _ in node.value:
                name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
                if name in seen and key.tag != "tag:yaml.org,2002:merge":
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} stands twice in one mapping", problem_mark=key.start_mark
                    )
                seen |= {name} - {None}
        return super().construct_mapping(node, deep)

    def construct_number(self, node):
        if len(node.value) > LONGEST_NUMBER:
            raise yaml.MarkedYAMLError(
                problem=f"a number of {len(node.value):,} characters; write a text in quotes",
                problem_mark=node.start_mark,
            )
        is_int = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _BoundedLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _BoundedLoader.construct_number)
