"""Turn a conversation into the text that a tokenizer's own chat template writes."""

import json
import re
from collections.abc import Sequence
from datetime import date, datetime
from functools import lru_cache
from typing import NamedTuple

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.conversation.rendering import UnboundedTemplate, render

ROLES = ("user", "assistant")
# Special tokens that a template may use.
_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "")
# A call of the function for the current time, with a literal format.
_DATE_CALL = re.compile(r"""strftime_now\(\s*(?:'([^'\\]*)'|"([^"\\]*)")\s*\)""")
# The text before the content of a part, if a template prints the list instead of reading it.
_PRINTED = re.compile(r"""["']text["']\s*:\s*["']$""")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Words that are in no template; none of them is part of another.
_PROBE_ASK, _PROBE_ANSWER, _PROBE_SYSTEM = "askzqj0", "answerzqj0", "systemzqj0"


class Unfit(ValueError):
    """A chat template cannot be used: the end of a sentence that starts with "the chat template"."""


class Form(NamedTuple):
    """The content of messages that a template reads: a text, or parts of text and of images.

    in_parts: the roles whose contents are lists of parts. images: whether an `<image>` in a text becomes an image
    part, which the template writes as `<image>` again; False leaves it in the text.
    """

    in_parts: frozenset = frozenset()
    images: bool = False

    def content(self, role: str, text: str):
        """Return the content of a message."""
        if role not in self.in_parts:
            return text
        return get_parts(text) if self.images else [{"type": "text", "text": text}]


_EVERYONE, _USER = frozenset({"system", *ROLES}), frozenset({"user"})
TEXT = Form()
# The first that fits is used. A template that reads parts but writes an image as other tokens (Qwen2-VL), or not at
# all (Granite), gets text parts, in which `<image>` stays.
_FORMS = (Form(_EVERYONE, True), Form(_USER, True), TEXT, Form(_EVERYONE), Form(_USER))


def template_text(tokenizer) -> str:
    """Return the Jinja text of a tokenizer's chat template; ValueError if it has none."""
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        found = "no tokenizer" if tokenizer is None else f"{tokenizer.name_or_path!r} without one"
        raise ValueError(
            f"the template 'chat' needs a tokenizer with a chat template; got {found}. "
            "Choose another template (--version, --conv-mode) or set tokenizer.chat_template."
        )
    return tokenizer.get_chat_template()


class Writer:
    """Writes messages by a tokenizer's chat template.

    template: its Jinja text. thinks: the variable `enable_thinking` (Qwen3), whether answers begin with reasoning.
    """

    def __init__(self, tokenizer, template: str, form: Form, thinks: bool = False):
        self.tokenizer, self.template, self.form, self.thinks = tokenizer, template, form, thinks

    def __call__(self, messages: Sequence[tuple[str, str]], is_open: bool = False) -> str:
        """Return the text of (role, text) messages; is_open: with the prompt for an answer.

        Raises Unfit with the template's message if it refuses these messages, UnboundedTemplate if it has no end.
        """
        return self._render(messages, add_generation_prompt=is_open)[0]

    def blocks(self, messages) -> list[str]:
        """Return the text of each `{% generation %}` block of (role, text) messages."""
        text, spans = self._render(messages, marks_answers=True)
        return [text[start:end] for start, end in spans]

    def _render(self, messages, **options) -> tuple[str, list[tuple[int, int]]]:
        """Return (text, spans of the blocks) of (role, text) messages."""
        variables = {**self.tokenizer.special_tokens_map, "enable_thinking": self.thinks, **options}
        try:
            return render(self.template, self.to_dicts(messages), self.tokenizer, **variables)
        except UnboundedTemplate:
            raise
        # A template may raise any error.
        except Exception as error:
            raise Unfit(f"refuses this conversation ({on_one_line(error)})") from error

    def to_dicts(self, messages) -> list[dict]:
        """Return (role, text) messages as the template reads them."""
        return [{"role": role, "content": self.form.content(role, text)} for role, text in messages]


def has_generation_blocks(template: str) -> bool:
    """Return whether a Jinja template marks its answers by `{% generation %}`."""
    return _GENERATION.search(template) is not None


def on_one_line(error: Exception) -> str:
    """Return the type and message of a template's error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"


def choose_form(tokenizer, template) -> Form:
    """Return the first form of contents for which a template writes every text once and in order."""
    asked = [("user", _PROBE_ASK), ("assistant", _PROBE_ANSWER)]
    shown = [("user", f"{DEFAULT_IMAGE_TOKEN}\n{_PROBE_ASK}"), asked[1]]
    for form in _FORMS:
        write = Writer(tokenizer, template, form)
        if not _reads(write, shown if form.images else asked, form.images):
            continue
        # Some templates read parts of users and assistants, and a text of the system.
        others = form._replace(in_parts=form.in_parts - {"system"})
        system = [("system", _PROBE_SYSTEM), *asked]
        changes = not _reads(write, system) and _reads(Writer(tokenizer, template, others), system)
        return others if changes else form
    return TEXT


def _reads(write: Writer, messages, num_images=0) -> bool:
    """Return whether a template writes the texts of messages once and in order, and this number of images."""
    try:
        written = write(messages)
    except Unfit:
        return False
    pieces = split_at(written, [text.rpartition("\n")[2] for _, text in messages])
    is_printed = pieces is not None and any(_PRINTED.search(piece) for piece in pieces)
    return pieces is not None and not is_printed and written.count(DEFAULT_IMAGE_TOKEN) == num_images


def split_at(text: str, words: Sequence[str]) -> list[str] | None:
    """Return the len(words) + 1 pieces between the words, None unless each occurs once and in this order."""
    pieces, start = [], 0
    for word in words:
        at = text.find(word, start)
        if at < 0 or text.count(word) != 1:
            return None
        pieces.append(text[start:at])
        start = at + len(word)
    return [*pieces, text[start:]]


@lru_cache(maxsize=16)
def takes_parts(template) -> bool:
    """Return whether a chat template reads messages in parts, as those of multimodal models do, and not only texts."""
    pieces = split_at(_write_in_parts(template, _PROBE_ASK), (_PROBE_ASK,))
    # A template that prints the list as a Python object does not read it.
    return pieces is not None and not _PRINTED.search(pieces[0])


@lru_cache(maxsize=16)
def takes_images(template) -> bool:
    """Return whether a chat template reads an image as a part of a message and writes it as `<image>`."""
    written = _write_in_parts(template, f"{DEFAULT_IMAGE_TOKEN}\n{_PROBE_ASK}")
    return takes_parts(template) and written.count(DEFAULT_IMAGE_TOKEN) == 1


def _write_in_parts(template, text: str) -> str:
    """Return what a chat template writes of a question in parts, "" if it refuses them."""
    conversation = [{"role": "user", "content": get_parts(text)}]
    try:
        return render(template, conversation, **_TOKENS)[0]
    except UnboundedTemplate:
        raise
    # A template may raise any error for a list where it expects a text.
    except Exception:
        return ""


def get_parts(text) -> list[dict]:
    """Return the parts of a text: one for every image placeholder, without the line break that follows it."""
    first, *others = text.split(DEFAULT_IMAGE_TOKEN)
    parts = [{"type": "text", "text": first}] if first or not others else []
    for rest in others:
        rest = rest.removeprefix("\n")
        parts += [{"type": "image"}, *([{"type": "text", "text": rest}] if rest else [])]
    return parts


def today() -> datetime:
    """Return the time of the first call of this process today, so that it does not change during a day."""
    return _first_moment(date.today())


@lru_cache(maxsize=1)
def _first_moment(_day) -> datetime:
    return datetime.now()


@lru_cache(maxsize=16)
def dated(template: str, moment: datetime) -> str:
    """Return a template that always writes the dates of `moment`.

    A template with today's date would change within a run, and between two renderings of one conversation. A template
    that computes its date format keeps the clock.
    """
    found = _DATE_CALL.findall(template)
    if not found or len(found) != template.count("strftime_now("):
        return template
    formats = {single or double for single, double in found}
    # A variable of a template hides the function of the same name. Jinja drops the line break after the block.
    dates = json.dumps({form: moment.strftime(form) for form in sorted(formats)}, ensure_ascii=False)
    return "{% set strftime_now = " + dates + ".get %}\n" + template
