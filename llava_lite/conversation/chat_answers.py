"""Turn a conversation into the text of a chat template and the character spans of its answers.

A conversation is rendered twice, once with placeholder words instead of its answers. The text around these words must
match the format of the template, and the real text must be the same with the answers in their places, so that no
content of an answer can move a span. Whitespace around an answer is lost where the template strips it.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import NamedTuple

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.conversation.chat_end_tokens import get_token_texts
from llava_lite.conversation.chat_format import THINK_END, ChatFormat, Edge, analyse, stand_in, word
from llava_lite.conversation.chat_template import (
    Form,
    Unfit,
    Writer,
    choose_form,
    dated,
    split_at,
    template_text,
    today,
)
from llava_lite.conversation.tokenizer_facts import remembered


class Written(NamedTuple):
    """The text of a conversation; answers: [start, end) of each answer with its end token."""

    text: str
    answers: tuple[tuple[int, int], ...]


class Chat:
    """A tokenizer's chat template with the options of a run.

    moment: the time for dates in the template, None for today. thinks: whether prompts ask for reasoning. end_token: a
    token that ends answers if the template writes no end token.
    """

    def __init__(self, tokenizer, moment: datetime | None = None, thinks=False, end_token: str | None = None):
        self.tokenizer, self.thinks, self.end_token = tokenizer, thinks, end_token
        self.template = dated(template_text(tokenizer), moment or today())

    @property
    def form(self) -> Form:
        """How the template takes message contents."""
        find = partial(choose_form, self.tokenizer, self.template)
        return remembered(self.tokenizer, ("form", self.template), find)

    def writer(self, thinks: bool) -> Writer:
        """Return what renders messages."""
        return Writer(self.tokenizer, self.template, self.form, thinks)

    def format(self, thinks: bool = False) -> ChatFormat:
        """Return the format of conversations whose last answer is plain, or has reasoning; Unfit if there is none."""

        def find():
            try:
                return analyse(self.writer(thinks), get_token_texts(self.tokenizer), self.end_token)
            except Unfit as error:
                return str(error)

        found = remembered(self.tokenizer, ("format", self.template, thinks, self.end_token), find)
        if isinstance(found, str):
            raise Unfit(found)
        return found

    @property
    def end_tokens(self) -> list[str]:
        """The end tokens of answers with and without reasoning, that of the last answer first; [] if none is known."""
        tokens = []
        for thinks in (self.thinks, not self.thinks):
            try:
                form = self.format(thinks)
            except Unfit:
                continue
            tokens += [edge.end for edge in (form.last, form.inner) if not isinstance(edge, str)]
        return tokens

    @property
    def added(self) -> str:
        """The text that our prompt adds to the template's generation prompt; "" if answers cannot be located."""
        try:
            return self.format(self.thinks).last.added
        except Unfit:
            return ""

    def _system(self, system: str | None, thinks: bool) -> str | None:
        """Return the system text; None in place of an empty one that the template has no room for: nothing is lost."""
        if system != "":
            return system
        try:
            return None if self.format(thinks).no_system else system
        except Unfit:
            return system

    def write(self, system: str | None, messages: Sequence[tuple[str, str]], is_strict: bool = True) -> Written:
        """Return a conversation with the spans of its answers; Unfit with the reason if they cannot be located.

        system: text, or None for the template's default. messages: (role, text), user and assistant alternating.
        is_strict: False leaves out spans that cannot be located.
        """
        answers = [text for _, text in messages[1::2]]
        write = self.writer(any(THINK_END in answer for answer in answers))
        turns = _with_roles(self._system(system, write.thinks), messages)
        written = write(turns)
        try:
            form = self.format(write.thinks)
            edges = _edges(form, system, len(messages))
            pieces, words = _pieces(write, turns, answers)
            _expect_texts(pieces, [text for _, text in messages[::2]])
            for i, edge in enumerate(edges):
                _expect_edge(pieces[i], pieces[i + 1], edge, i)
            if len(messages) % 2 == 0 and pieces[-1] != form.tail:
                raise Unfit(f"writes {pieces[-1]!r} after the last answer, expected {form.tail!r}")
            places = _places(written, pieces, answers, words)
            if edges and edges[-1] is form.last:
                _expect_prompt(write(turns[:-1], is_open=True), written, places[-1][0], form.last)
            return _marked(written, places, edges)
        except Unfit:
            if is_strict:
                raise
            return Written(written, ())

    def prompt(self, system: str | None, messages: Sequence[tuple[str, str]]) -> Written:
        """Return a conversation that ends with the prompt for an answer; Unfit if the template drops the system text.

        Spans of earlier answers that cannot be located are left out.
        """
        turns = _with_roles(self._system(system, self.thinks), messages)
        answers = [text for _, text in messages[1::2]]
        write = self.writer(self.thinks)
        written = write(turns, is_open=True) + self.added
        if system and system.strip() and system.strip().splitlines()[0] not in written:
            raise Unfit("leaves out the system text. Put it into the first question")
        if not answers:
            return Written(written, ())
        try:
            edge = self.format(self.thinks).inner
            if isinstance(edge, str):
                raise Unfit(edge)
            pieces, words = _pieces(write, turns, answers, is_open=True)
            pieces[-1] += self.added
            return _marked(written, _places(written, pieces, answers, words), [edge] * len(answers))
        except Unfit:
            # Earlier answers need the end token that they were trained with.
            if self.end_token is not None:
                raise
            return Written(written, ())


def prompts_differ(tokenizer) -> bool:
    """Return whether the generation prompt of a chat template depends on `enable_thinking`."""
    chat = Chat(tokenizer)
    return len({chat.writer(thinks)([("user", word("ask", 0))], is_open=True) for thinks in (False, True)}) > 1


def own_template(tokenizer, enable_thinking: bool = False, end_token: str | None = None) -> str:
    """Return the Jinja text of a tokenizer's chat template with the generation prompts of training, for other readers.

    It is the tokenizer's own text if its prompts are the same. Otherwise `enable_thinking` gets a default, and the
    missing part of the generation prompt is appended.
    """
    template = template_text(tokenizer)
    added = Chat(tokenizer, thinks=enable_thinking, end_token=end_token).added
    if added:
        words = json.dumps(added, ensure_ascii=False)
        # Jinja drops the last line break of a template.
        template = template.removesuffix("\n") + f"{{%+ if add_generation_prompt %}}{{{{ {words} }}}}{{% endif %}}"
    if "enable_thinking" not in template:
        return template
    value = str(enable_thinking).lower()
    return f"{{% if enable_thinking is not defined %}}{{% set enable_thinking = {value} %}}{{% endif %}}\n{template}"


def _edges(form: ChatFormat, system: str | None, num_messages: int) -> list[Edge]:
    """Return what surrounds each answer; Unfit if the template cannot render such a conversation."""
    if system and form.no_system:
        raise Unfit(f"{form.no_system}. Put the system text into the first question, or leave it out")
    edges = [form.inner] * (num_messages // 2)
    if num_messages % 2 == 0:
        edges[-1] = form.last
    for edge in edges:
        if isinstance(edge, str):
            raise Unfit(f"{edge}. Use records with one question and one answer")
    return edges


def _with_roles(system, messages) -> list[tuple[str, str]]:
    turns = [(("user", "assistant")[i % 2], text) for i, (_, text) in enumerate(messages)]
    return turns if system is None else [("system", system), *turns]


def _pieces(write: Writer, turns, answers, is_open=False) -> tuple[list[str], list[str]]:
    """Return the text around the answers of a conversation, and the words that replaced them."""
    suffix = "zqj"
    while any(suffix in text for _, text in turns):
        suffix += "q"
    words = [stand_in(answer, word("answer", i, suffix)) for i, answer in enumerate(answers)]
    stand_ins = iter(words)
    written = write(
        [(role, next(stand_ins) if role == "assistant" else text) for role, text in turns], is_open=is_open
    )
    pieces = split_at(written, words)
    if pieces is None:
        lost = next((i for i, text in enumerate(words) if written.count(text) != 1), 0)
        what = "reasoning" if THINK_END in answers[lost] else "text"
        raise Unfit(f"does not keep the {what} of answer {lost + 1} as it is written in the record")
    return pieces, words


def _expect_texts(pieces, questions) -> None:
    """Raise Unfit if a question is incomplete; its images may be in other positions."""
    for i, (piece, question) in enumerate(zip(pieces, questions, strict=False)):
        for text in question.split(DEFAULT_IMAGE_TOKEN):
            if text.strip() not in piece:
                raise Unfit(f"changes the text of question {i + 1}")


def _expect_edge(piece: str, after: str, edge: Edge, i: int) -> None:
    """Raise Unfit if the text around an answer does not match the format."""
    if not piece.endswith(edge.before):
        raise Unfit(f"writes {piece[-len(edge.before) - 10 :]!r} before answer {i + 1}, expected {edge.before!r}")
    if not edge.is_missing and not after.startswith(edge.end):
        raise Unfit(f"writes {after[: len(edge.end) + 10]!r} after answer {i + 1}, expected {edge.end!r}")


def _expect_prompt(prompt: str, text: str, start: int, edge: Edge) -> None:
    """Raise Unfit if the generation prompt differs from the text before the last answer, which starts at `start`."""
    asked, trained = prompt + edge.added, text[: start - edge.lead] + edge.extra
    if asked != trained:
        pairs = enumerate(zip(asked, trained, strict=False))
        at = next((i for i, (one, other) in pairs if one != other), min(len(asked), len(trained)))
        raise Unfit(
            f"prompts for the last answer with {asked[at : at + 40]!r} but writes {trained[at : at + 40]!r} before "
            "it, so training and inference would differ"
        )


def _places(text: str, pieces, answers, words) -> list[tuple[int, int]]:
    """Return [start, end) of each answer in a text; Unfit if the text around the answers is not `pieces`."""
    at, places = 0, []
    for i, answer in enumerate(answers):
        start = at + len(pieces[i])
        found = next((own for own in _spellings(answer) if text.startswith(own + pieces[i + 1], start)), None)
        if not text.startswith(pieces[i], at) or found is None:
            seen = text[start : start + len(answer) + 20]
            raise Unfit(f"does not write answer {i + 1} as it is in the record: {seen!r} for {answer!r}")
        at = start + len(found)
        places.append((start, at))
    if at + len(pieces[-1]) != len(text):
        raise Unfit(f"writes {text[at:]!r} after the last answer, expected {pieces[-1]!r}")
    return places


def _spellings(answer: str) -> list[str]:
    """Return the ways a template may write an answer: unchanged, stripped, with reasoning on its own lines."""
    ways = [answer, answer.strip(), answer.strip("\n"), answer.lstrip("\n"), answer.rstrip(), answer.lstrip()]
    opening, start, rest = answer.partition("<think>")
    reasoning, end, answer_text = rest.partition(THINK_END)
    if start and end and not opening.strip():
        block = f"<think>\n{reasoning.strip()}\n{THINK_END}\n\n"
        ways += [block + answer_text.lstrip("\n"), block + answer_text.strip()]
    return ways


def _marked(text: str, places, edges) -> Written:
    """Return the text with missing prompts and end tokens added, and the span of each answer with its end token."""
    parts, spans, at, length = [], [], 0, 0
    for i, ((start, end), edge) in enumerate(zip(places, edges, strict=True)):
        begins = text.startswith(edge.extra, start, end)
        if not begins and not edge.is_closed:
            raise Unfit(
                f"ends its generation prompt with {edge.extra!r}, and answer {i + 1} does not start with it: "
                f"{text[start : min(end, start + 20)]!r}"
            )
        before = text[at:start] + (edge.extra if edge.is_closed else "")
        own = len(edge.extra) if begins and not edge.is_closed else 0
        answer = text[start:end] + (edge.end if edge.is_missing else text[end : end + len(edge.end)])
        first = length + len(before) + (own or -edge.lead)
        length += len(before) + len(answer)
        spans.append((first, length))
        parts += [before, answer]
        at = end if edge.is_missing else end + len(edge.end)
    return Written("".join([*parts, text[at:]]), tuple(spans))
