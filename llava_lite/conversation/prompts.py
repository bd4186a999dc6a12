"""Turn messages into prompts: by a named template, or by a Jinja chat template.

A conversation in the order of training data (system text, then user and assistant alternating) is written as in
training. Any other order of roles is written message by message, as inference servers write it from a Jinja template.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from llava_lite.conversation import Rendered, get_template
from llava_lite.conversation.chat_template import has_generation_blocks, takes_parts
from llava_lite.conversation.images import place_images
from llava_lite.conversation.layout import Turn, write_turns
from llava_lite.conversation.messages import Message
from llava_lite.conversation.rendering import UnboundedTemplate, render

# Keys of a message that a named template cannot write.
FOREIGN_KEYS = ("tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
# Marks the position at which a prompt is cut; no text contains it.
CUT = "\u2603cut\u2603"
_BLOCKS = re.compile(r"\{[%{].*?[%}]\}", re.DOTALL)
_STRINGS = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"")


@lru_cache(maxsize=16)
def names_in(template: str) -> frozenset[str]:
    """Return the names in a Jinja template: its variables, and Jinja's keywords."""
    blocks = " ".join(_STRINGS.sub(" ", block) for block in _BLOCKS.findall(template))
    return frozenset(re.findall(r"[A-Za-z_]\w*", blocks))


def regular_turns(messages: list[Message]) -> tuple[list, str | None] | None:
    """Return (turns, system) of a conversation in the order of training data, None for any other order.

    turns: (question, answer) pairs; the last answer is None if the last message is the user's. A developer message is
    a system message.
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


def read_prompts(text, add_special_tokens: bool | None, needs_answers=False) -> list[Rendered]:
    """Return the prompts of a text, or of a list of texts and Rendered.

    add_special_tokens: None for the value of a Rendered, and True for a text. needs_answers: the spans of the answers
    must be known. Raises ValueError for anything else.
    """
    texts = [text] if isinstance(text, (str, Rendered)) else text
    if not isinstance(texts, Iterable) or isinstance(texts, (bytes, Mapping)):
        raise ValueError(f"text is a {type(text).__name__}; expected a prompt or a list of prompts.")
    prompts = []
    for i, one in enumerate(texts):
        if not isinstance(one, (str, Rendered)):
            hint = ". Messages go to apply_chat_template" if isinstance(one, Mapping) else ""
            raise ValueError(
                f"prompt {i + 1} is {'None' if one is None else f'a {type(one).__name__}'}, not a text{hint}."
            )
        if needs_answers and not isinstance(one, Rendered):
            raise ValueError(
                f"return_assistant_tokens_mask: the answers in the text of prompt {i + 1} are not known; give "
                "messages to apply_chat_template, or the result of `render`."
            )
        prompt = one if isinstance(one, Rendered) else Rendered(str(one), ())
        if any("\ud800" <= letter <= "\udfff" for letter in prompt.text):
            raise ValueError(f"prompt {i + 1} has a lone surrogate (half of a character), which no tokenizer accepts.")
        prompts.append(
            prompt if add_special_tokens is None else prompt._replace(add_special_tokens=add_special_tokens)
        )
    if not prompts:
        raise ValueError("there is no text; give one prompt or more.")
    return prompts


def place_message_images(messages: list[Message], use_im_start_end=False) -> list[Message]:
    """Return messages with texts as contents, and `<image>` where a text model's chat template needs it."""
    texts = [(message.role, message.text) for message in messages]
    placed = place_images(texts, get_template("chat"), use_im_start_end)
    return [message._replace(content=text) for message, (_, text) in zip(messages, placed, strict=True)]


def with_cut(message: Message, name: bool | str) -> Message:
    """Return the last message with CUT after its text, or after another field of that name."""
    if isinstance(name, str) and name != "content":
        if not isinstance(message.more.get(name), str):
            raise ValueError(f"continue_final_message={name!r}, but the last message has no text under {name!r}.")
        return message._replace(more=message.more | {name: message.more[name] + CUT})
    if isinstance(message.content, str):
        return message._replace(content=message.content + CUT)
    *first, last = message.content
    if last.is_image:
        raise ValueError("continue_final_message: the last message ends with an image; it has no text to continue.")
    return message._replace(content=(*first, last._replace(text=last.text + CUT)))


def check_no_answer_mask(messages: list[Message], needs_answers: bool) -> None:
    """Raise ValueError if the spans of answers are needed in an order of roles for which they are not known."""
    if needs_answers:
        roles = ", ".join(message.role for message in messages)
        raise ValueError(
            f"return_assistant_tokens_mask: answers are known only if user and assistant alternate; got {roles}."
        )


def check_roles(messages: list[Message], conv_template: str) -> None:
    """Raise ValueError for roles and keys that a named template cannot write."""
    roles = [message.role for message in messages]
    listed = ", ".join(roles)
    own = f"the template {conv_template!r}"
    others = sorted({role for role in roles if role in ("tool", "function")})
    if others:
        raise ValueError(f"{own} cannot write the role {others[0]!r}; got {listed}.")
    if any(role in ("system", "developer") for role in roles[1:]):
        raise ValueError(f"{own} has one system text, before all messages; got {listed}.")
    spoken = [role for role in roles if role in ("user", "assistant")]
    if not spoken:
        raise ValueError(f"a conversation needs at least one user message; got {listed}.")
    if spoken[0] == "assistant":
        raise ValueError(f"messages must be in the order (system,) user, assistant, user, ...; got {listed}.")
    lost = next((key for message in messages for key in FOREIGN_KEYS if message.more.get(key)), None)
    if lost is not None:
        raise ValueError(f"{own} cannot write {lost!r} of a message; a chat template may.")


def write_roles(
    messages: list[Message], conv_template: str, use_im_start_end=False, is_open=False, tokenizer=None
) -> Rendered:
    """Return messages in any order of roles by a named template, each like a turn of its role.

    tokenizer: names the end of text of the templates that write it.
    """
    template = get_template(conv_template).for_tokenizer(tokenizer)
    spoken = [(message.role, message.text) for message in messages if message.role in ("user", "assistant")]
    if len(spoken) < len(messages):
        template = template.with_turns([("human", "")], messages[0].text)
    user, assistant = template.roles
    turns = [
        Turn(assistant if role == "assistant" else user, text, is_answer=role == "assistant")
        for role, text in place_images(spoken, template, use_im_start_end)
    ]
    if is_open:
        turns.append(Turn(assistant, None, is_answer=True))
    return Rendered("".join(piece for piece, _ in write_turns(template, turns)), ())


def write_jinja_prompt(
    template: str, messages: list[Message], tokenizer, needs_answers=False, in_parts=None, **arguments
) -> Rendered:
    """Return the prompt of a Jinja template; needs_answers: with the spans of its `{% generation %}` blocks.

    in_parts: whether contents are lists of parts, None to detect it. arguments: tools, documents,
    add_generation_prompt, continue_final_message and the template's own keywords. Raises ValueError with the
    template's message if it refuses the conversation.
    """
    in_parts = takes_parts(template) if in_parts is None else in_parts
    # As in inference servers: a developer message is a system message for a template that has no developer.
    renamed = {} if "developer" in template else {"developer": "system"}
    messages = [message._replace(role=renamed.get(message.role, message.role)) for message in messages]
    if needs_answers and not has_generation_blocks(template):
        raise ValueError(
            "return_assistant_tokens_mask: the chat template does not mark its answers (it has no {% generation %}), "
            "and they are known only for a conversation in the order of training data."
        )
    variables = {**tokenizer.special_tokens_map, **arguments}
    try:
        dicts = [message.as_dict(in_parts) for message in messages]
        text, spans = render(template, dicts, tokenizer, needs_answers, **variables)
    except UnboundedTemplate:
        raise
    # A template may raise any error.
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise ValueError(f"the chat template refuses this conversation ({type(error).__name__}: {reason})") from error
    return Rendered(text, tuple(spans))


def cut_prompt(rendered: Rendered) -> Rendered:
    """Return a prompt up to CUT, where the model continues the last message; ValueError if CUT is missing."""
    at = rendered.text.rfind(CUT)
    if at < 0:
        raise ValueError(
            "continue_final_message: the template leaves out the last message, so it cannot be continued."
        )
    return rendered._replace(text=rendered.text[:at], answers=())
