"""Find the end mark of an answer in the text that a chat template writes after it.

An end mark is one added token of the tokenizer, or several in a row; only whitespace may be before it: `<|im_end|>`,
` </s>`.
"""

import re
from typing import NamedTuple


class Ends(NamedTuple):
    """The end marks that a template writes: of an answer with a question after it, and of the last answer.

    None where it writes none. is_open: the last answer lacks its end mark and gets that of the others. reason: why
    there is none.
    """

    inner: str | None
    last: str | None
    is_open: bool = False
    reason: str = ""


class _Run(NamedTuple):
    """A text that starts with tokens: the whitespace before them, the tokens in a row, the text after them."""

    blank: str
    tokens: tuple[str, ...]
    rest: str


def words_of(tokenizer) -> re.Pattern:
    """Return a pattern for the added tokens of a tokenizer except whitespace, the longest first."""
    words = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    return pattern_of(words)


def pattern_of(words) -> re.Pattern:
    """Return a pattern for any of some words, the longest first; it matches nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(words, key=lambda word: (-len(word), word)))) or "(?!)")


def find_ends(head, prompt, between, tail, words: re.Pattern, eos: str | None, bos: str | None) -> Ends:
    """Return the end marks in the fixed text of a template.

    head: the text before the first question, with a system text if possible. prompt: the text after a question whose
    answer is open. between: the text between an answer and the next question, None if there can be none. tail: the
    text after the last answer. words: pattern for tokens.
    """
    openers = _openers(head, words, eos) | ({bos} - {eos, None})
    inner, last = _run_of(between or "", words), _run_of(tail, words)
    if not tail.strip():
        # Either the other answers have an end mark, or none has.
        mark = None if inner is None else _mark(inner, openers)
        return Ends(mark, mark, mark is not None, "" if mark else _no_mark(between, tail, openers))
    # Text after the last answer starts no turn, unless the template always writes the header of another answer.
    header = _shared(_split(tail, words)[::-1], _split(prompt, words)[::-1])
    only_closes = not words.sub("", tail).strip() and not "".join(header).strip()
    if last is None or (not only_closes and last.tokens[0] in openers):
        return Ends(None, None, reason=_no_mark(between, tail, openers))
    shared = () if inner is None else _shared(inner.tokens, last.tokens)
    shared = [*shared[:only_closes], *_before(shared[only_closes:], openers)]
    if shared:
        mark = "".join(shared)
        return Ends(inner.blank + mark, last.blank + mark)
    # A token after the last answer alone must be EOS or used for nothing else: it could be a role header.
    elsewhere = openers if between is None else set(words.findall("".join((head, prompt, between))))
    if last.tokens[0] != eos and (not only_closes or last.tokens[0] in elsewhere):
        return Ends(None, None, reason=_no_mark(between, tail, openers))
    of_inner = None if inner is None or inner.tokens[0] in openers else inner.blank + inner.tokens[0]
    return Ends(of_inner, last.blank + last.tokens[0])


def _openers(head: str, words: re.Pattern, eos: str | None) -> set[str]:
    """Return the tokens that start a conversation or a turn: those before any text, and the last before a question."""
    run, found = _run_of(head, words), words.findall(head)
    leading = set(run.tokens) if run is not None else set()
    while run is not None and (run := _run_of(run.rest, words)) is not None:
        leading |= set(run.tokens)
    return (leading | set(found[-1:])) - {eos}


def _run_of(text: str, words: re.Pattern) -> _Run | None:
    """Return the tokens that a text starts with, None if it starts with anything else."""
    blank = text[: len(text) - len(text.lstrip())]
    tokens, at = [], len(blank)
    while match := words.match(text, at):
        tokens.append(match[0])
        at = match.end()
    return _Run(blank, tuple(tokens), text[at:]) if tokens else None


def _split(text: str, words: re.Pattern) -> list[str]:
    """Return a text as its tokens and the text between them."""
    return [piece for piece in re.split(f"({words.pattern})", text) if piece]


def _mark(run: _Run, openers) -> str | None:
    tokens = _before(run.tokens, openers)
    return run.blank + "".join(tokens) if tokens else None


def _before(tokens, openers) -> list[str]:
    """Return the tokens up to the first that starts a turn."""
    return list(tokens[: next((i for i, token in enumerate(tokens) if token in openers), len(tokens))])


def _shared(one, other):
    """Return the common beginning of two sequences."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _no_mark(between, tail, openers) -> str:
    after = f"{tail!r} after the last answer"
    if between is not None:
        after = f"{between!r} after an answer and {after}"
    known = f" ({', '.join(map(repr, sorted(openers)))} starts a turn)" if openers else ""
    return f"it writes {after}, which starts with no end mark that is a token of this tokenizer{known}"
