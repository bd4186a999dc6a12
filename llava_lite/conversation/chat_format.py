"""Find how a chat template writes, prompts for and ends an answer: render conversations of placeholder words.

Done once for a template: the text between the words of a few short conversations is the template's own. It must not
depend on the length of the conversation, and the text before an answer must be the template's own generation prompt.
The reasons in `Unfit` are ends of sentences that start with "the chat template".
"""

import re
from functools import partial
from typing import NamedTuple

from llava_lite.conversation.chat_end_tokens import Ends, find_ends
from llava_lite.conversation.chat_template import Unfit, Writer, has_generation_blocks, split_at

# The end of reasoning in an answer, as Qwen3 and most other templates write it.
THINK_END = "</think>"
_SYSTEM = "systemzqj"


class Edge(NamedTuple):
    """The text around an answer.

    before: the text between the question and the answer; its last `lead` characters belong to the answer, as the space
    in " red" after "[/INST]". added: the part of it that our prompt adds to the template's generation prompt, such as
    an empty reasoning block. extra: the part of the generation prompt after `before`. If it is closed, as an empty
    reasoning block is, it is inserted before the answer; otherwise the answer itself must start with it ("<think>").
    end: the end token with the whitespace before it; is_missing: the template does not write it.
    """

    before: str
    lead: int
    added: str
    extra: str
    end: str
    is_missing: bool
    is_closed: bool = False


class ChatFormat(NamedTuple):
    """How a template writes conversations.

    inner: the text around an answer with a question after it, or the reason why there can be no such answer. last: the
    text around the last answer. tail: the text after that. no_system: why a system text is refused, "" if it is kept.
    skeleton: all that was found; templates with equal skeletons give the same tokens.
    """

    inner: Edge | str
    last: Edge
    tail: str
    no_system: str
    skeleton: str


class Glue(NamedTuple):
    """The template's own text around the words of one conversation."""

    head: str
    asked: tuple[str, ...]  # between each question and what follows it
    between: tuple[str, ...]  # between an answer and the next question
    tail: str  # after the last answer; "" if the last answer is open


def word(kind: str, i: int, suffix: str = "zqj") -> str:
    """Return a placeholder word; no such word is part of another."""
    return f"{kind}{i:04d}{suffix}"


def stand_in(answer: str, placeholder: str) -> str:
    """Return the text that replaces an answer while its position is searched, with reasoning if the answer has it."""
    return f"<think>\nof {placeholder}\n{THINK_END}\n\n{placeholder}" if THINK_END in answer else placeholder


def analyse(write: Writer, words: re.Pattern, end_token: str | None = None) -> ChatFormat:
    """Return the format of a writer's template; Unfit with the reason if its answers cannot be located.

    words: pattern for the tokenizer's tokens. end_token: a token that ends answers if the template has no end token.
    """
    thinks, eos, bos = write.thinks, write.tokenizer.eos_token, write.tokenizer.bos_token
    probe = partial(_glue, write)
    closed, opened = [probe(1)], [probe(1, is_open=True)]
    try:
        closed += [probe(2), probe(3)]
        opened.append(probe(2, is_open=True))
        no_history = ""
    except Unfit as error:
        closed, opened, no_history = closed[:1], opened[:1], str(error)
    _expect_same(closed, opened)
    head, before, tail = closed[0].head, closed[0].asked[-1], closed[0].tail
    prompt = opened[0].asked[-1]
    between = closed[-1].between[0] if not no_history else None
    with_system = _try_glue(write, 1, system=True)
    ends = find_ends(
        with_system.head if isinstance(with_system, Glue) else head, prompt, between, tail, words, eos, bos
    )
    blocks = _supervised_blocks(write, len(closed)) if has_generation_blocks(write.template) else None
    if end_token is not None:
        ends = _given_ends(ends, between, tail, end_token)
    if ends.last is None:
        raise Unfit(
            f"has no end token: {ends.reason}. Choose a token that ends answers, such as --chat_end_token "
            f"{eos or 'TOKEN'}"
        )
    last = _edge(before, prompt, ends.last, ends.is_open and not tail.startswith(ends.last), blocks and blocks[-1])
    last = _with_supervised_end(last, blocks and blocks[-1], words)
    if thinks and THINK_END in last.added:
        raise Unfit(f"writes {last.added!r} before an answer that has its own reasoning")
    last = last._replace(is_closed=bool(last.extra) and not thinks and _is_closed(last.extra, write))
    inner = no_history or _inner_edge(closed[-1], prompt + last.added, ends, blocks, words)
    no_system = _why_no_system(write, closed, opened)
    parts = [head, before, prompt, tail, no_history, *map(repr, (inner, last, no_system, closed[-1]))]
    return ChatFormat(inner, last, tail, no_system, "\0".join([*parts, repr(with_system)]))


def _glue(write, num_turns, is_open=False, system=False) -> Glue:
    """Return the glue of a conversation of placeholder words; Unfit unless each is written once and in order."""
    asks, answers = _words(write, num_turns, is_open)
    words = [text for pair in zip(asks, [*answers, None], strict=False) for text in pair if text is not None]
    messages = [(("user", "assistant")[i % 2], text) for i, text in enumerate(words)]
    if system:
        messages, words = [("system", _SYSTEM), *messages], [_SYSTEM, *words]
    written = write(messages, is_open=is_open)
    pieces = split_at(written, words)
    if pieces is None:
        raise Unfit(_what_is_missing(written, words))
    if system:
        pieces = [pieces[0] + _SYSTEM + pieces[1], *pieces[2:]]
    head, *rest = pieces
    tail = "" if is_open else rest.pop()
    return Glue(head, tuple(rest[::2]), tuple(rest[1::2]), tail)


def _words(write, num_turns, is_open=False) -> tuple[list[str], list[str]]:
    """Return the placeholder words for the questions and the answers of a conversation."""
    asks = [word("ask", i) for i in range(num_turns)]
    answers = [word("answer", i) for i in range(num_turns - is_open)]
    if write.thinks and not is_open:
        answers[-1] = stand_in(THINK_END, answers[-1])
    return asks, answers


def _try_glue(write, num_turns, is_open=False, system=False) -> Glue | str:
    """Return the glue, or the reason why there is none."""
    try:
        return _glue(write, num_turns, is_open, system)
    except Unfit as error:
        return str(error)


def _what_is_missing(written, words) -> str:
    for text in words:
        if written.count(text) != 1:
            what = "a system text" if text == _SYSTEM else "a question" if text.startswith("ask") else "an answer"
            if THINK_END in text:
                return f"does not keep reasoning as it is written in the record ({text!r})"
            times = written.count(text)
            return f"writes {what} {times} times" if times else f"leaves out {what}"
    return "writes the turns in another order"


def _expect_same(closed: list[Glue], opened: list[Glue]) -> None:
    """Raise Unfit if the glue of a turn depends on the length of the conversation."""
    longest = closed[-1]
    seen = {
        "before the first question": [glue.head for glue in (*closed, *opened)],
        "before the last answer": [glue.asked[-1] for glue in closed],
        "after the last answer": [glue.tail for glue in closed],
        "before an earlier answer": [text for glue in (*closed, *opened) for text in glue.asked[:-1]],
        "after an earlier answer": [text for glue in (*closed, *opened) for text in glue.between],
        "as the prompt for an answer": [glue.asked[-1] for glue in opened],
    }
    assert len(longest.asked) == len(closed)
    for where, texts in seen.items():
        other = next((text for text in texts if text != texts[0]), None)
        if other is not None:
            raise Unfit(
                f"writes {texts[0]!r} or {other!r} {where}, depending on the length of the conversation, so an answer "
                "cannot be found by its position"
            )


def _edge(before, prompt, end, is_missing, block) -> Edge:
    """Return the text around an answer; Unfit if the text before it is not the generation prompt."""
    if prompt.startswith(before):
        return Edge(before, 0, "", prompt[len(before) :], end, is_missing)
    if not before.startswith(prompt):
        raise Unfit(f"prompts for an answer with {prompt!r} but writes {before!r} before one")
    gap = before[len(prompt) :]
    # The text of a {% generation %} block is generated by the model, also before an answer.
    own = block[0] if block is not None and THINK_END not in gap else ""
    if not gap.strip() or (own.strip() and not gap[: max(0, len(gap) - len(own))].strip()):
        return Edge(before, len(gap), "", "", end, is_missing)
    # The rest is prompt, such as an empty reasoning block. Many tokenizers join a space at its end with the answer.
    added = gap.rstrip(" ")
    return Edge(before, len(gap) - len(added), added, "", end, is_missing)


def _is_closed(extra, write: Writer) -> bool:
    """Return whether the extra text of a prompt asks for an answer without reasoning."""
    if THINK_END in extra:
        return True
    other = _try_glue(Writer(write.tokenizer, write.template, write.form, thinks=True), 1, is_open=True)
    own = _try_glue(write, 1, is_open=True)
    return "<think>" not in extra and isinstance(other, Glue) and own.asked[-1] == other.asked[-1] + extra


def _inner_edge(longest: Glue, prompt, ends: Ends, blocks, words) -> Edge | str:
    """Return the text around an answer that a question follows, or the reason why it cannot be located."""
    before, between = longest.asked[0], longest.between[0]
    if ends.inner is None:
        return f"writes {between!r} after an answer that another question follows, without an end token"
    try:
        edge = _edge(before, prompt, ends.inner, not between.startswith(ends.inner), blocks and blocks[0])
    except Unfit as error:
        return str(error)
    if edge.added and THINK_END not in edge.added:
        return f"writes {before!r} before an answer that another question follows, and {prompt!r} before the last"
    # In history the end of the prompt is dropped, such as Qwen3's empty reasoning block.
    return _with_supervised_end(edge._replace(extra=""), blocks and blocks[0], words)


def _given_ends(ends: Ends, between, tail, end_token) -> Ends:
    """Return the end tokens, with a given one where the template has none."""
    own = {token.strip() for token in (ends.inner, ends.last) if token is not None}
    if own - {end_token}:
        raise Unfit(f"ends answers with {min(own - {end_token})!r} itself; drop --chat_end_token {end_token}")

    def at(glue):
        space = glue[: len(glue) - len(glue.lstrip())]
        return space + end_token if glue.lstrip().startswith(end_token) else end_token

    inner = ends.inner or (None if between is None else at(between))
    return Ends(inner, ends.last or at(tail), is_open=True)


def _supervised_blocks(write, num_turns) -> list[tuple[str, str]]:
    """Return the text before and after each answer in its `{% generation %}` block.

    Unfit unless each answer has one block of its own.
    """
    asks, answers = _words(write, num_turns)
    pairs = zip(asks, answers, strict=True)
    blocks = write.blocks([turn for ask, answer in pairs for turn in (("user", ask), ("assistant", answer))])
    holding = [[block for block in blocks if answer in block] for answer in answers]
    if any(len(found) != 1 for found in holding) or any(ask in block for ask in asks for block in blocks):
        raise Unfit("has {% generation %} blocks that do not hold exactly one answer each")
    return [tuple(found[0].split(answer)) for found, answer in zip(holding, answers, strict=True)]


def _with_supervised_end(edge: Edge, block, words) -> Edge:
    """Return an edge that ends with its `{% generation %}` block, if that adds only whitespace and tokens."""
    if block is None or edge.is_missing or not block[1].startswith(edge.end):
        return edge
    more = block[1][len(edge.end) :]
    return edge if words.sub("", more).strip() else edge._replace(end=block[1])


def _why_no_system(write, closed, opened) -> str:
    """Return why a system text cannot be used, "" if training and inference write it alike."""
    found = {}
    for glue, is_open in [*((glue, False) for glue in closed[:2]), *((glue, True) for glue in opened[:2])]:
        num_turns = len(glue.asked)
        with_system = _try_glue(write, num_turns, is_open, system=True)
        if isinstance(with_system, str):
            when = "in a prompt for an answer" if is_open else "in a conversation that ends with an answer"
            return f"{with_system} {when}" if "system" in with_system else with_system
        if with_system[1:] != glue[1:]:
            return "writes other turns after a system text"
        found[with_system.head] = with_system
    if len(found) > 1:
        one, other = list(found)[:2]
        return f"writes a system text as {one!r} and as {other!r}"
    return ""
