"""Turn a conversation in any spelling (LLaVA's, ShareGPT's, OpenAI's, ms-swift's) into turns of human and gpt."""

from typing import NamedTuple

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.conversation.layout import SPEAKERS
from llava_lite.data.errors import DataError
from llava_lite.data.records.image_values import describe
from llava_lite.data.records.keys import IMAGE_KEYS, SUPERVISED_KEYS, media_keys
from llava_lite.data.records.media import find_media
from llava_lite.data.records.parts import check_text, read_content

ROLE_OF = {
    **dict.fromkeys(("human", "user"), "human"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bot", "bing", "bard"), "gpt"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TOOL_ROLES = {"tool", "function", "tool_call", "tool_calls", "tool_response", "function_call", "observation"}
TOOL_ROLES |= {"function_response", "tool_result", "ipython", "environment"}
TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


class Dialogue(NamedTuple):
    """A conversation in human and gpt turns. `images`: of its image parts, None for a part that names none."""

    turns: tuple[tuple[str, str], ...]
    system: str | None = None
    images: tuple[str | bytes | None, ...] = ()
    not_supervised: frozenset[int] = frozenset()
    num_dropped: int = 0  # turns before the first question that are left out


def plain_turns(conversation, name: str) -> list[tuple[str, str]] | None:
    """Return the turns of a conversation in LLaVA's own spelling, human and gpt alternating; None for any other."""
    if type(conversation) is not list:
        return None
    turns, expected, other = [], *SPEAKERS
    for turn in conversation:
        if type(turn) is not dict or len(turn) != 2:
            return None
        text = turn.get("value")
        if turn.get("from") != expected or type(text) is not str:
            return None
        turns.append((expected, text if text.isascii() else check_text(text, name)))
        expected, other = other, expected
    return turns


def read_dialogue(conversation, key: str, name: str) -> Dialogue:
    """Return the turns of a conversation in any known spelling.

    conversation: a list of turns with from/value or role/content (text, or a list of text and image parts), a list of
    {human, assistant} pairs, or an object of equally long lists. key: of the conversation, for messages. An image part
    becomes an image placeholder; text parts are joined unchanged. A system turn must be the first. Raises DataError
    with the name of the record for an unknown role, part or key of a turn.
    """
    turns = _as_list(conversation, key, name)
    if not turns:
        raise DataError(f"{name}: {key!r} is empty, expected a list of turns, the first from 'human'.")
    if all(isinstance(turn, dict) and _pair_keys(turn) for turn in turns):
        turns = [turn for pair in turns for turn in _of_pair(pair)]
    spoken, system, images, not_supervised = [], None, [], set()
    for turn in turns:
        role, text, shown, is_supervised = _read_turn(turn, name)
        images += shown
        if role == "system":
            if spoken or system is not None:
                raise DataError(f"{name}: a system turn comes after others; expected one, as the first turn.")
            if shown:
                raise DataError(f"{name}: the system turn holds an image; move it into the first question.")
            system = text
            continue
        if not is_supervised:
            not_supervised.add(len(spoken))
        spoken.append((role, text))
    if images and any(DEFAULT_IMAGE_TOKEN in text for text in _texts_without_parts(turns)):
        raise DataError(
            f"{name} has image parts and also {DEFAULT_IMAGE_TOKEN} in a text, so the order of the images is unknown. "
            "Make all of them parts, or none."
        )
    return Dialogue(tuple(spoken), system, tuple(images), frozenset(not_supervised))


def _as_list(conversation, key: str, name: str) -> list:
    if isinstance(conversation, dict):
        # Older versions of `datasets` store a list of objects as an object of lists.
        return transpose(conversation, f"{name}: the conversations are")
    if not isinstance(conversation, (list, tuple)):
        raise DataError(f"{name}: {key!r} is {describe(conversation)}, expected a list of turns.")
    return list(conversation)


def transpose(lists: dict, what: str) -> list[dict]:
    """Return the objects of an object of equally long lists; DataError that begins with `what` for any other."""
    lengths = [len(values) if isinstance(values, list) else type(values).__name__ for values in lists.values()]
    if len(set(lengths)) != 1 or not isinstance(lengths[0], int):
        found = ", ".join(f"{key} {length}" for key, length in zip(lists, lengths, strict=True)) or "nothing"
        raise DataError(f"{what} {found}; expected equally long lists.")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _pair_keys(turn: dict) -> tuple[str, str] | None:
    """Return the keys of a question and its answer in one object (ms-swift, The Cauldron)."""
    for asked in ("human", "user"):
        if asked in turn and "assistant" in turn and not {"from", "role"} & turn.keys():
            return asked, "assistant"
    return None


def _of_pair(pair: dict) -> list[dict]:
    asked, answered = _pair_keys(pair)
    return [{"from": "human", "value": pair[asked]}, {"from": "gpt", "value": pair[answered]}]


def _only(turn: dict, keys: tuple[str, str], what: str, name: str):
    """Return the value of the one of two keys that a turn has; `what` is the key's meaning."""
    found = [turn[key] for key in keys if turn.get(key) is not None]
    if len(found) > 1 and found[0] != found[1]:
        raise DataError(f"{name}: a turn has {keys[0]!r} and {keys[1]!r}, and they differ.")
    if not found:
        have = ", ".join(map(repr, turn)) or "nothing"
        if what == "role":
            raise DataError(
                f"{name}: a turn is from {turn.get(keys[0])!r}, expected 'human' or 'gpt' (it has {have})."
            )
        raise DataError(f"{name}: the {keys[0]!r} of a turn is NoneType None, expected a string (it has {have}).")
    return found[0]


def _read_turn(turn, name: str) -> tuple[str, str, list, bool]:
    """Return role, text, the images of its parts, and whether an answer is supervised."""
    if not isinstance(turn, dict):
        raise DataError(f"{name}: a turn is {describe(turn)}, expected an object with 'from' and 'value'.")
    role = _role(_only(turn, ("from", "role"), "role", name), name)
    is_supervised = True
    if len(turn) > 2:
        _check_turn_keys(turn, name)
        is_supervised = _is_supervised(turn, role, name)
    text, images = read_content(_only(turn, ("value", "content"), "text", name), name)
    if images and role == "gpt":
        raise DataError(f"{name}: an answer holds an image part; images stand in questions.")
    return role, text, images, is_supervised


def _role(role_name, name: str) -> str:
    role = ROLE_OF.get(role_name.strip().lower()) if isinstance(role_name, str) else None
    if role is None and isinstance(role_name, str) and role_name.strip().lower() in TOOL_ROLES:
        raise DataError(
            f"{name}: a turn is from {role_name!r}; tools and functions are not supported. Leave such records out, or "
            "write call and result as text into questions and answers."
        )
    if role is None:
        known = ", ".join(ROLE_OF)
        raise DataError(f"{name}: a turn is from {role_name!r}, expected 'human' or 'gpt' (known: {known}).")
    return role


def _check_turn_keys(turn: dict, name: str) -> None:
    for key in (*TOOL_KEYS, *REASONING_KEYS):
        if turn.get(key):
            reason = (
                "tools and functions are not supported"
                if key in TOOL_KEYS
                else "reasoning is supervised as a part of the answer: write <think>...</think> before its text"
            )
            raise DataError(f"{name}: a turn has {key!r}; {reason}.")
    for key in (*(key for key in IMAGE_KEYS if turn.get(key)), *find_media(turn), *media_keys(turn)):
        raise DataError(
            f"{name}: a turn has the key {key!r} with an image or other media, which would not be seen. Name the "
            f"images under 'images' of the record, with {DEFAULT_IMAGE_TOKEN} in their places, or as 'content' parts."
        )


def _is_supervised(turn: dict, role: str, name: str) -> bool:
    given = {key: turn[key] for key in SUPERVISED_KEYS if turn.get(key) is not None}
    if turn.get("masked") is not None:
        given["masked"] = not turn["masked"] if isinstance(turn["masked"], bool) else turn["masked"]
    for key, value in given.items():
        if isinstance(value, bool) or (isinstance(value, (int, float)) and value in (0, 1)):
            continue
        raise DataError(
            f"{name}: a turn has {key} {value!r}; an answer is supervised (1, true) or not (0, false); weights "
            "between them are not supported."
        )
    if len({bool(value) for value in given.values()}) > 1:
        raise DataError(f"{name}: the keys {', '.join(given)} of a turn contradict each other: {given}.")
    wanted = next((bool(value) for value in given.values()), True)
    if role != "gpt" and given and wanted:
        raise DataError(
            f"{name}: a turn from {turn.get('from') or turn.get('role')!r} has {given}; only answers are supervised. "
            "Drop the key."
        )
    return wanted if role == "gpt" else True


def _texts_without_parts(turns: list) -> list[str]:
    """Return all texts of a conversation: contents, and text parts."""
    texts = []
    for turn in turns:
        content = turn.get("value") if turn.get("value") is not None else turn.get("content")
        for part in content if isinstance(content, (list, tuple)) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            texts += [text] if isinstance(text, str) else []
    return texts


def drop_greeting(dialogue: Dialogue) -> Dialogue:
    """Return the dialogue without a first turn of the model before any question, as in LLaVA."""
    if not dialogue.turns or dialogue.turns[0][0] != "gpt":
        return dialogue
    moved = frozenset(position - 1 for position in dialogue.not_supervised if position)
    return dialogue._replace(turns=dialogue.turns[1:], not_supervised=moved, num_dropped=1)
