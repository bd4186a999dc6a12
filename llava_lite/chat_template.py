"""Turn a conversation into the text that a tokenizer's own chat template writes."""

import json
import re
from collections.abc import Sequence
from datetime import date, datetime
from functools import lru_cache
from typing import NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from llava_lite.constants import DEFAULT_IMAGE_TOKEN

ROLES = ("user", "assistant")
# Special tokens that a template may use.
_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "")
# A call of the function for the current time, with a literal format.
_DATE_CALL = re.compile(r"""strftime_now\(\s*(?:'([^'\\]*)'|"([^"\\]*)")\s*\)""")
# The text before the content of a part, if a template prints the list instead of reading it.
_PRINTED = re.compile(r"""["']text["']\s*:\s*["']$""")
# Words that are in no template; none of them is part of another.
_PROBE_ASK, _PROBE_ANSWER, _PROBE_SYSTEM = "askzqj0", "answerzqj0", "systemzqj0"


class Unfit(ValueError):
    """A chat template cannot be used; the reason is the end of a sentence that starts with "the chat template"."""


class Form(NamedTuple):
    """What a template takes as the content of a message: a text, or parts of text and of images.

    in_parts: the roles whose contents are lists of parts. images: whether an `<image>` in a text is a part of its own,
    which the template writes as `<image>` again; False leaves it in the text.
    """

    in_parts: frozenset = frozenset()
    images: bool = False

    def content(self, role: str, text: str):
        """Return the content of a message."""
        if role not in self.in_parts:
            return text
        return parts_of(text) if self.images else [{"type": "text", "text": text}]


_EVERYONE, _USER = frozenset({"system", *ROLES}), frozenset({"user"})
TEXT = Form()
# The first that fits is used. For a template that reads parts but writes an image as other tokens (Qwen2-VL), or not
# at all (Granite), that is text, in which `<image>` stays as it is.
_FORMS = (Form(_EVERYONE, True), Form(_USER, True), TEXT, Form(_EVERYONE), Form(_USER))


def template_text(tokenizer) -> str:
    """Return the Jinja text of a tokenizer's chat template; ValueError where there is none."""
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

        Raises Unfit with the template's own words where it takes no such messages.
        """
        try:
            return self.tokenizer.apply_chat_template(
                self.said(messages),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=is_open,
                enable_thinking=self.thinks,
            )
        # A template may raise anything.
        except Exception as error:
            raise Unfit(f"does not take this conversation ({in_words(error)})") from error

    def blocks(self, messages) -> list[str]:
        """Return what each `{% generation %}` block holds of (role, text) messages."""
        # A different text, since transformers stores these spans in the compiled template, which other threads use.
        template = "{# blocks #}\n" + self.template
        try:
            texts, spans = render_jinja_template(
                conversations=[self.said(messages)],
                chat_template=template,
                return_assistant_tokens_mask=True,
                enable_thinking=self.thinks,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:
            raise Unfit(f"does not take this conversation ({in_words(error)})") from error
        return [texts[0][start:end] for start, end in spans[0]]

    def said(self, messages) -> list[dict]:
        """Return (role, text) messages as the template takes them."""
        return [{"role": role, "content": self.form.content(role, text)} for role, text in messages]


def in_words(error: Exception) -> str:
    """Return an error of a template on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"


def choose_form(tokenizer, template) -> Form:
    """Return how a template takes contents: the first form in which it writes every text once and in order."""
    asked = [("user", _PROBE_ASK), ("assistant", _PROBE_ANSWER)]
    shown = [("user", f"{DEFAULT_IMAGE_TOKEN}\n{_PROBE_ASK}"), asked[1]]
    for form in _FORMS:
        write = Writer(tokenizer, template, form)
        if not _reads(write, shown if form.images else asked, form.images):
            continue
        # Some templates take parts from users and assistants, and a text from the system.
        others = form._replace(in_parts=form.in_parts - {"system"})
        system = [("system", _PROBE_SYSTEM), *asked]
        changes = not _reads(write, system) and _reads(Writer(tokenizer, template, others), system)
        return others if changes else form
    return TEXT


def _reads(write: Writer, messages, num_images=0) -> bool:
    """Tell whether a template writes the texts of some messages once and in order, and so many images."""
    try:
        written = write(messages)
    except Unfit:
        return False
    pieces = split_at(written, [text.rpartition("\n")[2] for _, text in messages])
    is_printed = pieces is not None and any(_PRINTED.search(piece) for piece in pieces)
    return pieces is not None and not is_printed and written.count(DEFAULT_IMAGE_TOKEN) == num_images


def split_at(text: str, words: Sequence[str]) -> list[str] | None:
    """Return the len(words) + 1 pieces between the words, None unless each is there once and in this order."""
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
    """Tell whether a chat template reads messages in parts, as those of models that see do, and not texts alone."""
    talk = [{"role": "user", "content": [{"type": "text", "text": _PROBE_ASK}]}]
    try:
        written = render_jinja_template(conversations=[talk], chat_template=template, **_TOKENS)[0][0]
    # A template may do anything with a list where it expects a text.
    except Exception:
        return False
    pieces = split_at(written, (_PROBE_ASK,))
    # One that prints the list as it stands has not read it.
    return pieces is not None and not _PRINTED.search(pieces[0])


@lru_cache(maxsize=16)
def takes_images(template) -> bool:
    """Tell whether a chat template reads an image as a part of a message and writes it as `<image>`."""
    talk = [{"role": "user", "content": parts_of(f"{DEFAULT_IMAGE_TOKEN}\n{_PROBE_ASK}")}]
    try:
        written = render_jinja_template(conversations=[talk], chat_template=template, **_TOKENS)[0][0]
    except Exception:
        return False
    return takes_parts(template) and written.count(DEFAULT_IMAGE_TOKEN) == 1


def parts_of(text) -> list[dict]:
    """Return a text as a message's parts: one for every image placeholder, without the line break that follows it."""
    first, *others = text.split(DEFAULT_IMAGE_TOKEN)
    parts = [{"type": "text", "text": first}] if first or not others else []
    for words in others:
        words = words.removeprefix("\n")
        parts += [{"type": "image"}, *([{"type": "text", "text": words}] if words else [])]
    return parts


def today() -> datetime:
    """Return the moment of the first call in this process today, so that dates do not change during a day."""
    return _first_moment(date.today())


@lru_cache(maxsize=1)
def _first_moment(_day) -> datetime:
    return datetime.now()


@lru_cache(maxsize=16)
def dated(template: str, moment: datetime) -> str:
    """Return a template that writes the dates of `moment` whenever it is rendered.

    Templates with today's date would change within a run, and between two renderings of one conversation. One that
    makes up its format as it goes keeps its clock.
    """
    found = _DATE_CALL.findall(template)
    if not found or len(found) != template.count("strftime_now("):
        return template
    formats = {single or double for single, double in found}
    # A variable of a template hides the function of the same name. Jinja drops the line break after the block.
    dates = json.dumps({form: moment.strftime(form) for form in sorted(formats)}, ensure_ascii=False)
    return "{% set strftime_now = " + dates + ".get %}\n" + template
