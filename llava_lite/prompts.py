"""Turn messages into prompts: by a named format, by the tokenizer's own chat template, or by a Jinja text.

A conversation that goes as training data does (system text, then user and assistant in turns) is written as in
training. Any other order of roles is written message by message, as inference servers write it from a Jinja template.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from threading import Lock

from transformers.utils.chat_template_utils import render_jinja_template

from llava_lite.chat_template import takes_parts
from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.conversation import Rendered, SeparatorStyle, get_template, place_images
from llava_lite.messages import Message

# What a named format has no place for, and would lose.
FOREIGN_KEYS = ("tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
# Stands behind a text at which a prompt is to be cut; no text holds it.
CUT = "\u2603cut\u2603"
_BLOCKS = re.compile(r"\{[%{].*?[%}]\}", re.DOTALL)
_STRINGS = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# transformers keeps what it tracks of `{% generation %}` on the compiled template.
_tracking = Lock()


@lru_cache(maxsize=16)
def names_in(template: str) -> frozenset[str]:
    """Return the names that a Jinja text uses: its keywords among them, and Jinja's own words."""
    blocks = " ".join(_STRINGS.sub(" ", block) for block in _BLOCKS.findall(template))
    return frozenset(re.findall(r"[A-Za-z_]\w*", blocks))


def regular_turns(messages: list[Message]) -> tuple[list, str | None] | None:
    """Return (turns, system) of a conversation in the order of training data, None in any other.

    turns: (question, answer) pairs, the last answer None where the user speaks last. A developer's message is a
    system message.
    """
    system, rest = None, messages
    if messages[0].role in ("system", "developer"):
        system, rest = messages[0].text, messages[1:]
    roles = [message.role for message in rest]
    if not roles or roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
        return None
    texts = [message.text for message in rest]
    answers = [*texts[1::2], *([None] if len(texts) % 2 else [])]
    return list(zip(texts[::2], answers, strict=True)), system


def read_prompts(text, add_special_tokens: bool | None, marks_answers=False) -> list[Rendered]:
    """Return the prompts of a text or a list of them, each a text or a Rendered.

    add_special_tokens: None for what a Rendered says itself, and for a text True. marks_answers: the answers must be
    known. Raises ValueError for anything else.
    """
    texts = [text] if isinstance(text, (str, Rendered)) else text
    if not isinstance(texts, Iterable) or isinstance(texts, (bytes, Mapping)):
        raise ValueError(f"text is a {type(text).__name__}; expected a prompt or a list of prompts.")
    prompts = []
    for i, one in enumerate(texts):
        if not isinstance(one, (str, Rendered)):
            hint = ". Messages go to apply_chat_template" if isinstance(one, Mapping) else ""
            raise ValueError(
                f"prompt {i + 1} is {'None' if one is None else f'a {type(one).__name__}'}, no text{hint}."
            )
        if marks_answers and not isinstance(one, Rendered):
            raise ValueError(
                f"return_assistant_tokens_mask: the answers in the text of prompt {i + 1} are not known; give "
                "messages to apply_chat_template, or what `render` returns."
            )
        prompt = one if isinstance(one, Rendered) else Rendered(str(one), ())
        if any("\ud800" <= letter <= "\udfff" for letter in prompt.text):
            raise ValueError(f"prompt {i + 1} holds half of a character (a lone surrogate), which no tokenizer takes.")
        prompts.append(
            prompt if add_special_tokens is None else prompt._replace(add_special_tokens=add_special_tokens)
        )
    if not prompts:
        raise ValueError("there is no text; give one prompt or more.")
    return prompts


def placed_images(messages: list[Message], use_im_start_end=False) -> list[Message]:
    """Return messages of texts alone, each `<image>` where a text model's chat template is to write it."""
    told = [(message.role, message.text) for message in messages]
    placed = place_images(told, get_template("chat"), use_im_start_end)
    return [message._replace(content=text) for message, (_, text) in zip(messages, placed, strict=True)]


def with_cut(message: Message, name: bool | str) -> Message:
    """Return the last message with the CUT behind its text, or behind another field of that name."""
    if isinstance(name, str) and name != "content":
        if not isinstance(message.more.get(name), str):
            raise ValueError(f"continue_final_message={name!r}, but the last message has no text under {name!r}.")
        return message._replace(more=message.more | {name: message.more[name] + CUT})
    if isinstance(message.content, str):
        return message._replace(content=message.content + CUT)
    *first, last = message.content
    if last.is_image:
        raise ValueError("continue_final_message: the last message ends with an image, and has no text to go on with.")
    return message._replace(content=(*first, last._replace(text=last.text + CUT)))


def marks_generations(template: str) -> bool:
    """Tell whether a Jinja text says which part of what it writes is an answer."""
    return _GENERATION.search(template) is not None


def check_no_mask(messages: list[Message], marks_answers: bool) -> None:
    """Raise ValueError if answers are to be marked in an order of roles in which they are not known."""
    if marks_answers:
        roles = ", ".join(message.role for message in messages)
        raise ValueError(
            f"return_assistant_tokens_mask: answers are known where user and assistant take turns; got {roles}."
        )


def check_roles(messages: list[Message], conv_template: str) -> None:
    """Raise ValueError for what a named format has no place for."""
    roles = [message.role for message in messages]
    listed = ", ".join(roles)
    own = f"the prompt format {conv_template!r}"
    others = sorted({role for role in roles if role in ("tool", "function")})
    if others:
        raise ValueError(f"{own} has no place for the role {others[0]!r}; got {listed}.")
    if any(role in ("system", "developer") for role in roles[1:]):
        raise ValueError(f"{own} has one system text, in front of all messages; got {listed}.")
    spoken = [role for role in roles if role in ("user", "assistant")]
    if not spoken:
        raise ValueError(f"a conversation needs at least one message of the user; got {listed}.")
    if spoken[0] == "assistant":
        raise ValueError(f"messages must go (system,) user, assistant, user, ...; got {listed}.")
    lost = next((key for message in messages for key in FOREIGN_KEYS if message.more.get(key)), None)
    if lost is not None:
        raise ValueError(f"{own} has no place for {lost!r} of a message; a chat template may have one.")


def write_roles(messages: list[Message], conv_template: str, use_im_start_end=False, is_open=False) -> Rendered:
    """Return messages in any order of roles in a named format, each as its role's turns are written."""
    template = get_template(conv_template)
    spoken = [(message.role, message.text) for message in messages if message.role in ("user", "assistant")]
    if len(spoken) < len(messages):
        template = template.with_turns([("human", "")], messages[0].text)
    spoken = place_images(spoken, template, use_im_start_end)
    style, sep, end = template.sep_style, template.sep, template.sep2 or template.sep
    if style is SeparatorStyle.PLAIN:
        pieces = [
            DEFAULT_IMAGE_TOKEN * text.count(DEFAULT_IMAGE_TOKEN) if role == "user" else text + sep
            for role, text in spoken
        ]
        return Rendered(template.system + "".join(pieces), ())
    if style is SeparatorStyle.LLAMA_2:
        system = f"<<SYS>>\n{template.system}\n<</SYS>>\n\n" if template.system else ""
        first = next(i for i, (role, _) in enumerate(spoken) if role == "user")
        pieces = [
            f" {text} {end}"
            if role == "assistant"
            else f"[INST] {system}{text} [/INST]"
            if i == first
            else f"{sep}[INST] {text} [/INST]"
            for i, (role, text) in enumerate(spoken)
        ]
        return Rendered("".join(pieces), ())
    colon, blank = (":", " ") if style in (SeparatorStyle.SINGLE, SeparatorStyle.TWO) else ("", "")
    user, assistant = (role + colon for role in template.roles)
    answered = end if style is SeparatorStyle.TWO else sep
    pieces = [
        user + blank + text + sep if role == "user" else assistant + blank + text + answered for role, text in spoken
    ]
    return Rendered(template.system + sep + "".join(pieces) + (assistant if is_open else ""), ())


def write_jinja_prompt(
    template: str, messages: list[Message], tokenizer, marks_answers=False, in_parts=None, **arguments
) -> Rendered:
    """Return messages as a Jinja text writes them, with the spans of its `{% generation %}` blocks if asked for.

    in_parts: whether contents are lists of parts, None to find out. arguments: tools, documents,
    add_generation_prompt, continue_final_message and the template's own keywords. Raises ValueError with the
    template's words where it refuses.
    """
    in_parts = takes_parts(template) if in_parts is None else in_parts
    # As servers do: to a template that knows no developer he is the system.
    renamed = {} if "developer" in template else {"developer": "system"}
    said = [message._replace(role=renamed.get(message.role, message.role)) for message in messages]
    if marks_answers and not marks_generations(template):
        raise ValueError(
            "return_assistant_tokens_mask: the chat template does not say which part of its text is an answer (it has "
            "no {% generation %}), and the conversation is not one of training data, whose answers are known."
        )
    given = {**tokenizer.special_tokens_map, **arguments}
    try:
        with _tracking:
            texts, spans = render_jinja_template(
                conversations=[[message.as_dict(in_parts) for message in said]],
                chat_template=template,
                return_assistant_tokens_mask=marks_answers,
                **given,
            )
    # A template may raise anything.
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise ValueError(
            f"the chat template does not take this conversation ({type(error).__name__}: {reason})"
        ) from error
    answers = tuple(tuple(span) for span in spans[0]) if marks_answers else ()
    return Rendered(texts[0], answers)


def cut_at_mark(rendered: Rendered) -> Rendered:
    """Return a prompt up to the CUT that stands behind the text to go on with; ValueError if it was lost."""
    at = rendered.text.rfind(CUT)
    if at < 0:
        raise ValueError(
            "continue_final_message: the prompt format leaves the last message out, so that it cannot be gone on with."
        )
    return rendered._replace(text=rendered.text[:at], answers=())
