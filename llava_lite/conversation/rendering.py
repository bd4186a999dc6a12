"""Turn messages into the text of a Jinja chat template, as transformers renders it, within bounds of time and memory.

A checkpoint brings its template with it, so it may be anybody's; see bounded_jinja. What a template can use is what
transformers gives it: the functions, filters and tags of its `render_jinja_template`, and plain values.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import numpy as np
from jinja2 import TemplateError, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock
from jinja2.utils import Namespace
from transformers.utils import get_json_schema

from llava_lite.conversation.bounded_jinja import (
    LONGEST_TEMPLATE,
    BoundedEnvironment,
    Unbounded,
    bounded,
    bounded_filter,
    check_size,
)

# Names of a message's reasoning; the first is the one that templates read.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Where a tokenizer's template comes from, in the order in which transformers looks for it.
_FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")


class UnboundedTemplate(ValueError):
    """A chat template has no end, or needs too much memory; the message names its file."""


def render(template: str, messages: list[dict], tokenizer=None, marks_answers=False, tools=None, **variables):
    """Return (text, spans) of one conversation; spans: [start, end) of each `{% generation %}` block.

    tokenizer: whose template it is, for messages. tools: JSON schemas, or functions that have one. variables: what the
    template can read besides; all values become plain ones. Raises UnboundedTemplate for a template without an end,
    and whatever error the template itself raises.
    """
    variables = {"tools": None if tools is None else [as_schema(tool) for tool in tools], **variables}
    variables = as_plain({"messages": list(map(with_reasoning, messages)), "documents": None, **variables})
    try:
        with bounded() as account:
            compiled = compile_template(template)
            return _write(compiled, {"add_generation_prompt": False, **variables}, marks_answers, account)
    except Unbounded as error:
        raise UnboundedTemplate(
            f"the chat template {describe_source(tokenizer)} is not used: {error}. Take the template of the model's "
            "publisher, or choose another one (--version, --conv-mode)."
        ) from None


def _write(compiled, variables: dict, marks_answers: bool, account) -> tuple[str, list[tuple[int, int]]]:
    """Return (text, spans) of a compiled template."""
    pieces, _blocks.spans, length = [], [] if marks_answers else None, 0
    try:
        for piece in compiled.generate(**variables):
            account.charge(len(piece))
            length += len(piece)
            check_size(length)
            _blocks.length = length
            pieces.append(piece)
        return "".join(pieces), _blocks.spans or []
    finally:
        _blocks.spans, _blocks.length = None, 0


def describe_source(tokenizer) -> str:
    """Return the file that a tokenizer's template was read from, as far as it is known."""
    name = getattr(tokenizer, "name_or_path", None)
    if not name:
        return "of the tokenizer"
    found = next((Path(name, file) for file in _FILES if Path(name, file).is_file()), None)
    return f"of {name!r}" if found is None else f"of {str(found)!r}"


def as_plain(value):
    """Return a value made of JSON's types; anything else, such as an image, becomes a text that names its type."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {as_plain(key): as_plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(as_plain, value)) if type(value) in (list, tuple) else list(map(as_plain, value))
    for kind in (str, int, float):
        if isinstance(value, kind):
            # Without the methods of a class of its own.
            return getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, np.generic):
        return as_plain(value.item())
    if callable(getattr(value, "model_dump", None)):
        return as_plain(value.model_dump())
    return f"<{type(value).__name__}>"


def as_schema(tool: dict | Callable) -> dict:
    """Return the JSON schema of a tool, which may be a function with type hints and a docstring."""
    if not isinstance(tool, dict) and not callable(tool):
        raise ValueError(f"a tool is a JSON schema or a function with type hints and a docstring; got {tool!r}.")
    return tool if isinstance(tool, dict) else get_json_schema(tool)


def with_reasoning(message: Mapping) -> Mapping:
    """Return a message with its reasoning under the names that templates read."""
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _Blocks(threading.local):
    """The spans of the `{% generation %}` blocks that this thread has written, and the length of the text so far."""

    spans = None
    length = 0


_blocks = _Blocks()


class _Generation(Extension):
    """The tag `{% generation %}` of transformers, which marks what a model is trained on."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _mark(self, context, caller) -> str:
        text = caller()
        if _blocks.spans is not None:
            _blocks.spans.append((_blocks.length, _blocks.length + len(text)))
        return text


class _Namespace(Namespace):
    """A namespace without the names of Python's internals, and without a text of all that it holds."""

    def __init__(*arguments, **attributes):
        self, *given = arguments
        attributes = dict(*given, **attributes)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name, value):
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace of a chat template cannot have the attribute {name!r}; rename it.")


class _Dict:
    """`dict` without the attributes of the class."""

    def __call__(self, *arguments, **items) -> dict:
        return dict(*arguments, **items)

    def fromkeys(self, *arguments) -> dict:
        return dict.fromkeys(*arguments)


def _raise_exception(message):
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # jinja2's own writes some letters as for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Environment(BoundedEnvironment):
    """What transformers gives a chat template."""

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }


@lru_cache(maxsize=64)
def compile_template(template: str):
    """Return a compiled template; raises jinja2's errors, and Unbounded for a text that is no template by its size."""
    if len(template) > LONGEST_TEMPLATE:
        raise Unbounded(f"it has {len(template):,} characters, more than {LONGEST_TEMPLATE:,}")
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    environment = _Environment()
    environment.filters["tojson"] = bounded_filter("tojson", _to_json)
    return environment
