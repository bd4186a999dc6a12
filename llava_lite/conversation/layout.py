"""Write the turns of a conversation in the layout of a named template, as text and as what of it is supervised."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.conversation.templates import INPUT_MARK, WITH_INPUT, SeparatorStyle

SPEAKERS = ("human", "gpt")


class Rendered(NamedTuple):
    """A prompt and the spans of it that are supervised.

    answers: [start, end) character spans of `text`: each answer with its end token.
    add_special_tokens: False if `text` already holds all of them, as a chat template writes it.
    literals: [start, end) of special tokens that are text and not tokens.
    cuts_prompts: no token may reach into an answer, so that the text before it is tokenised as the prompt alone is.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    add_special_tokens: bool = True
    literals: tuple[tuple[int, int], ...] = ()
    cuts_prompts: bool = False


class Turn(NamedTuple):
    """A turn in a template. role: as the template writes it. text: None for an open turn that waits for its answer."""

    role: str
    text: str | None
    is_answer: bool
    is_supervised: bool = True


def put_images_first(text: str, num_images: int) -> str:
    """Return a question with a line `<image>` in front for each of its images, as LLaVA writes them."""
    return f"{DEFAULT_IMAGE_TOKEN}\n" * num_images + text


def check_speakers(turns: Sequence[tuple[str, str | None]]) -> None:
    """Raise ValueError unless human and gpt alternate in (speaker, text) turns, human first."""
    for i, (speaker, _) in enumerate(turns):
        expected = SPEAKERS[i % 2]
        if speaker != expected:
            raise ValueError(
                f"turn {i + 1} of {len(turns)} is from {speaker!r}, expected {expected!r}: human and gpt alternate, "
                "human first."
            )


def write_turns(template, turns: Sequence[Turn]) -> Iterator[tuple[str, bool]]:
    """Yield (text, is supervised) pieces; their concatenation is the prompt. template: a Conversation."""
    style, sep, end = template.sep_style, template.sep, template.sep2
    if style in (SeparatorStyle.SINGLE, SeparatorStyle.TWO, SeparatorStyle.MPT):
        colon, space = ("", "") if style is SeparatorStyle.MPT else (":", " ")
        yield template.system + sep, False
        yield from _with_roles(turns, colon, space, sep, end if style is SeparatorStyle.TWO else sep)
    elif style is SeparatorStyle.LLAMA_2:
        yield from _llama_2(template, turns)
    elif style is SeparatorStyle.PLAIN:
        yield from _plain(template, turns, template.sep)
    elif style is SeparatorStyle.CAPTION:
        yield from _plain(template, turns, end)
    elif style is SeparatorStyle.INSTRUCT:
        yield from _instruct(template, turns)
    elif style is SeparatorStyle.ACCESSORY:
        yield from _accessory(template, turns)
    else:
        raise ValueError("the template 'chat' is the tokenizer's own: call render(tokenizer), not get_prompt().")


def _with_roles(turns, colon: str, space: str, end_of_question: str, end_of_answer: str):
    for turn in turns:
        yield turn.role + colon, False
        if turn.text is not None:
            end = end_of_answer if turn.is_answer else end_of_question
            yield space + turn.text + end, turn.is_answer and turn.is_supervised


def _llama_2(template, turns):
    if turns and turns[0].text is None:
        raise ValueError("a Llama-2 template needs a first message from the user; got an open one.")
    system = f"<<SYS>>\n{template.system}\n<</SYS>>\n\n" if template.system else ""
    for i, turn in enumerate(turns):
        if turn.text is None:
            continue
        if turn.is_answer:
            yield f" {turn.text} {template.sep2}", turn.is_supervised
        else:
            # No BOS before the first turn: the tokenizer writes it itself.
            yield f"{template.sep}[INST] {turn.text} [/INST]" if i else f"[INST] {system}{turn.text} [/INST]", False


def _instruct(template, turns):
    question = next((turn.text for turn in turns if not turn.is_answer), None) or ""
    opening = WITH_INPUT.get(template.system, template.system) if INPUT_MARK in question else template.system
    if opening:
        yield opening + template.sep, False
    yield from _with_roles(turns, "", "", template.sep, template.sep2)


def _accessory(template, turns):
    sep, end = template.sep, template.sep2
    spaced = [turn._replace(role=f" {turn.role}") for turn in turns]
    if end is not None:
        yield template.system + sep, False
        yield from _with_roles(spaced, ":", " ", sep, end)
        return
    yield f"{template.system}\n\n{sep}", False
    yield from _with_roles(spaced, ":", " ", f"\n{sep}", f"\n{sep}")
    if turns and turns[-1].is_answer and turns[-1].text is not None:
        # After the end token of the last answer, and never supervised.
        yield template.eos_token, False


def _plain(template, turns, end):
    yield template.system, False
    for turn in turns:
        if turn.text is None:
            continue
        if turn.is_answer:
            yield turn.text + end, turn.is_supervised
        else:
            yield DEFAULT_IMAGE_TOKEN * turn.text.count(DEFAULT_IMAGE_TOKEN), False
