"""Find the end token of an answer in the text that a chat template writes after it.

An end token is one added token of the tokenizer, or several in a row; only whitespace may be before it: `<|im_end|>`,
` </s>`.
"""

import re
from typing import NamedTuple


class Ends(NamedTuple):
    """The end tokens that a template writes: of an answer with a question after it, and of the last answer.

    None where it writes none. is_open: the last answer lacks its end token and gets that of the others. reason: why
    there is none.
    """

    inner: str | None
    last: str | None
    is_open: bool = False
    reason: str = ""


class _Run(NamedTuple):
    """A text that starts with tokens: the whitespace before them, the tokens in a row, the text after them."""

    space: str
    tokens: tuple[str, ...]
    rest: str


def get_token_texts(tokenizer) -> re.Pattern:
    """Return a pattern for the added tokens of a tokenizer except whitespace, the longest first."""
    words = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    return get_pattern(words)


def get_pattern(words) -> re.Pattern:
    """Return a pattern for any of some words, the longest first; it matches nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(words, key=lambda word: (-len(word), word)))) or "(?!)")


def find_ends(head, prompt, between, tail, words: re.Pattern, eos: str | None, bos: str | None) -> Ends:
    """Return the end tokens in the fixed text of a template.

    head: the text before the first question, with a system text if possible. prompt: the text after a question whose
    answer is open. between: the text between an answer and the next question, None if there can be none. tail: the
    text after the last answer. words: pattern for tokens.
    """
    openers = _openers(head, words, eos) | ({bos} - {eos, None})
    inner, last = _get_run(between or "", words), _get_run(tail, words)
    if not tail.strip():
        # Either the other answers have an end token, or none has.
        closing = [] if inner is None else _before(inner.tokens, openers)
        if not closing:
            return Ends(None, None, reason=_no_end_token(between, tail, openers))
        token = inner.space + "".join(closing)
        return Ends(token, token, is_open=True)
    # Text after the last answer starts no turn, unless the template always writes the header of another answer.
    header = _shared(_split(tail, words)[::-1], _split(prompt, words)[::-1])
    only_closes = not words.sub("", tail).strip() and not "".join(header).strip()
    if last is None or (not only_closes and last.tokens[0] in openers):
        return Ends(None, None, reason=_no_end_token(between, tail, openers))
    shared = () if inner is None else _shared(inner.tokens, last.tokens)
    shared = [*shared[:only_closes], *_before(shared[only_closes:], openers)]
    if shared:
        token = "".join(shared)
        return Ends(inner.space + token, last.space + token)
    # A token after the last answer alone must be EOS or used for nothing else: it could be a role header.
    elsewhere = openers if between is None else set(words.findall("".join((head, prompt, between))))
    if last.tokens[0] != eos and (not only_closes or last.tokens[0] in elsewhere):
        return Ends(None, None, reason=_no_end_token(between, tail, openers))
    of_inner = None if inner is None or inner.tokens[0] in openers else inner.space + inner.tokens[0]
    return Ends(of_inner, last.space + last.tokens[0])


def _openers(head: str, words: re.Pattern, eos: str | None) -> set[str]:
    """Return the tokens that start a conversation or a turn: those before any text, and the last before a question."""
    run, found = _get_run(head, words), words.findall(head)
    leading = set(run.tokens) if run is not None else set()
    while run is not None and (run := _get_run(run.rest, words)) is not None:
        leading |= set(run.tokens)
    return (leading | set(found[-1:])) - {eos}


def _get_run(text: str, words: re.Pattern) -> _Run | None:
    """Return the tokens that a text starts with, None if it starts with anything else."""
    space = text[: len(text) - len(text.lstrip())]
    tokens, at = [], len(space)
    while match := words.match(text, at):
        tokens.append(match[0])
        at = match.end()
    return _Run(space, tuple(tokens), text[at:]) if tokens else None


def _split(text: str, words: re.Pattern) -> list[str]:
    """Return a text as its tokens and the text between them."""
    return [piece for piece in re.split(f"({words.pattern})", text) if piece]


def _before(tokens, openers) -> list[str]:
    """Return the tokens up to the first that starts a turn."""
    return list(tokens[: next((i for i, token in enumerate(tokens) if token in openers), len(tokens))])


def _shared(one, other):
    """Return the common beginning of two sequences."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _no_end_token(between, tail, openers) -> str:
    after = f"{tail!r} after the last answer"
    if between is not None:
        after = f"{between!r} after an answer and {after}"
    known = f" ({', '.join(map(repr, sorted(openers)))} starts a turn)" if openers else ""
    return f"it writes {after}, which starts with no end token that is a token of this tokenizer{known}"
