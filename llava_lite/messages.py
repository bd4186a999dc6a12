"""Turn role-and-content messages, in the spellings of transformers and of OpenAI, into texts, images and roles.

What is accepted follows the inference servers that read such messages (vLLM, SGLang); what they pass on to a template
that would lose it is refused here with a sentence that names conversation, message and part.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.image_inputs import as_list, decoded_base64, pictures_of_each, upright_picture

__all__ = ["Message", "Part", "as_list", "pictures_of_each", "read_conversations", "upright_picture", "with_images"]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Types of parts, OpenAI's two interfaces among them, and the key that holds a part's text or image.
TEXTS = {"text": "text", "input_text": "text", "output_text": "text"}
IMAGES = ("image", "image_url", "input_image")
KNOWN_TYPES = ("text", "image", "image_url", "input_text", "input_image", "output_text")
SOURCES = ("image", "path", "url", "base64", "image_url")
# What begins with other roles and keys: ShareGPT's.
SHAREGPT = {"human": "user", "gpt": "assistant"}


class Part(NamedTuple):
    """A piece of a message: a text, or an image as the caller gave it (None where it comes another way)."""

    text: str | None
    image: Any = None

    @property
    def is_image(self) -> bool:
        """Whether this is an image."""
        return self.text is None


class Message(NamedTuple):
    """What one role says. content: parts, or one text; more: what else the message holds, such as tool_calls."""

    role: str
    content: str | tuple[Part, ...]
    more: dict

    @property
    def text(self) -> str:
        """The content as one text, with an image placeholder where an image stands."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(DEFAULT_IMAGE_TOKEN if part.is_image else part.text for part in self.content)

    @property
    def images(self) -> list:
        """The images in their order, None for one that comes another way."""
        return [] if isinstance(self.content, str) else [part.image for part in self.content if part.is_image]

    def as_dict(self, in_parts: bool) -> dict:
        """Return the message as a chat template takes it; in_parts: texts as parts too, some read nothing else."""
        if self.content == "" and self.more.get("tool_calls"):
            # Templates write a null as "None", and take a missing key for what it is.
            return {"role": self.role, **self.more}
        if not in_parts:
            return {"role": self.role, "content": self.text, **self.more}
        parts = (Part(self.content),) if isinstance(self.content, str) else self.content
        content = [{"type": "image"} if part.is_image else {"type": "text", "text": part.text} for part in parts]
        return {"role": self.role, "content": content, **self.more}


def read_conversations(conversation) -> tuple[list[list[Message]], bool]:
    """Return (conversations, whether there were several) of messages, or of a list of lists of messages.

    Raises ValueError with the place for whatever is no conversation.
    """
    conversation = getattr(conversation, "messages", conversation)
    if not isinstance(conversation, (list, tuple)):
        keys = f" with {', '.join(map(repr, conversation))}" if isinstance(conversation, Mapping) else ""
        hint = ". Give what it holds under 'messages'" if "messages" in keys else ""
        raise ValueError(
            f"a conversation is a list of messages, {{'role': ..., 'content': ...}}; got {_kind(conversation)}{keys}"
            f"{hint}."
        )
    if not conversation:
        raise ValueError("the conversation is empty; give at least one message of the user.")
    nested = [isinstance(getattr(one, "messages", one), (list, tuple)) for one in conversation]
    if any(nested) and not all(nested):
        raise ValueError("some entries of the conversation are messages and others are lists of them; give one kind.")
    if not nested[0]:
        return [_read_messages(conversation, "")], False
    talks = [getattr(talk, "messages", talk) for talk in conversation]
    for i, talk in enumerate(talks):
        if not talk:
            raise ValueError(f"conversation {i + 1} is empty; give at least one message of the user.")
    return [_read_messages(talk, f"conversation {i + 1}, ") for i, talk in enumerate(talks)], True


def with_images(talks: list[list[Message]], images) -> list[list]:
    """Return the images of each conversation, those of `images` where a part or a placeholder brings none itself.

    images: None, all in order, or one list for each conversation. Raises ValueError if too few or too many are given.
    """
    own = [[image for message in talk for image in message.images] for talk in talks]
    open_counts = [sum(image is None for image in group) for group in own]
    in_texts = [sum(message.text.count(DEFAULT_IMAGE_TOKEN) for message in talk) for talk in talks]
    if images is None:
        for i, count in enumerate(open_counts):
            if count:
                raise ValueError(
                    f"{count} image parts of conversation {i + 1} hold no image; give one of "
                    f"{', '.join(SOURCES[:4])} in the part, or images= beside the messages."
                )
        return own
    groups = as_list(images)
    if any(group is None or isinstance(group, (list, tuple)) for group in groups):
        groups = [as_list(group) for group in groups]
        if len(groups) != len(talks):
            raise ValueError(f"{len(groups)} lists of images for {len(talks)} conversations; give one for each.")
    else:
        wanted = [
            in_text - len(group) + count for in_text, group, count in zip(in_texts, own, open_counts, strict=True)
        ]
        if sum(wanted) != len(groups):
            raise ValueError(
                f"{len(groups)} images for {sum(wanted)} places in {len(talks)} conversations that hold none yet."
            )
        rest = iter(groups)
        groups = [[next(rest) for _ in range(count)] for count in wanted]
    return [_filled(talk, group, i) for i, (talk, group) in enumerate(zip(talks, groups, strict=True))]


def _filled(talk: list[Message], given: list, i: int) -> list:
    """Return a conversation's images in the order of their places, the given ones where there is none."""
    rest, found = iter(given), []
    try:
        for message in talk:
            if isinstance(message.content, str):
                found += [next(rest) for _ in range(message.content.count(DEFAULT_IMAGE_TOKEN))]
                continue
            for part in message.content:
                if part.is_image:
                    found.append(next(rest) if part.image is None else part.image)
                else:
                    found += [next(rest) for _ in range(part.text.count(DEFAULT_IMAGE_TOKEN))]
    except StopIteration:
        raise ValueError(f"{len(given)} images are too few for the places of conversation {i + 1}.") from None
    left = len(list(rest))
    if left:
        raise ValueError(f"{left} of the {len(given)} images have no place in conversation {i + 1}.")
    return found


def _read_messages(messages, place: str) -> list[Message]:
    return [_read_message(message, f"{place}message {i + 1}") for i, message in enumerate(messages)]


def _read_message(message, place: str) -> Message:
    """Return one message; place: what to call it in an error."""
    if not isinstance(message, Mapping) and hasattr(message, "role") and hasattr(message, "content"):
        # As OpenAI's client returns them.
        dumped = message.model_dump() if hasattr(message, "model_dump") else vars(message)
        message = {key: value for key, value in dumped.items() if value is not None}
    if not isinstance(message, Mapping):
        raise ValueError(f"{place} is {_kind(message)}; expected {{'role': ..., 'content': ...}}.")
    if "role" not in message:
        hint = " 'from' and 'value' are ShareGPT's names of them." if "from" in message else ""
        raise ValueError(f"{place} has no 'role', only {', '.join(map(repr, message)) or 'nothing'}.{hint}")
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
        hint = f" Did you mean {SHAREGPT[role]!r}?" if isinstance(role, str) and role in SHAREGPT else ""
        raise ValueError(f"{place} has the role {role!r}; known: {', '.join(ROLES)}.{hint}")
    place = f"{place} ({role})"
    more = {key: value for key, value in message.items() if key not in ("role", "content") and value is not None}
    content = message.get("content")
    if content is None and not more.get("tool_calls"):
        found = "no 'content'" if "content" not in message else "'content' None"
        raise ValueError(f'{place} has {found}; give a text, "" for none, or a list of parts.')
    return Message(role, "" if content is None else _read_content(content, place), more)


def _read_content(content, place: str) -> str | tuple[Part, ...]:
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        hint = "; put the part into a list" if isinstance(content, Mapping) else ""
        raise ValueError(f"the content of {place} is {_kind(content)}{hint}. Expected a text or a list of parts.")
    if not content:
        raise ValueError(f"the content of {place} is an empty list; give a text, or parts.")
    return tuple(_read_part(part, f"part {i + 1} of {place}") for i, part in enumerate(content))


def _read_part(part, place: str) -> Part:
    if isinstance(part, str):
        return Part(part)
    if not isinstance(part, Mapping):
        raise ValueError(f"{place} is {_kind(part)}; expected {{'type': 'text', 'text': ...}} or an image.")
    kind = part["type"] if "type" in part else _guessed_type(part, place)
    if isinstance(kind, str) and kind in TEXTS:
        return Part(_text_of(part, TEXTS[kind], place))
    if isinstance(kind, str) and kind in IMAGES:
        return Part(None, _image_of(part, place))
    raise ValueError(f"{place} has the type {kind!r}; known: {', '.join(KNOWN_TYPES)}.")


def _guessed_type(part: Mapping, place: str) -> str:
    """Return the type of a part that names none, where its keys leave no choice, as servers do."""
    found = [name for name in ("text", "image", "image_url") if part.get(name) is not None]
    if len(found) != 1:
        raise ValueError(f"{place} has no 'type', only {', '.join(map(repr, part)) or 'nothing'}.")
    return found[0]


def _text_of(part: Mapping, key: str, place: str) -> str:
    text = part.get(key)
    if not isinstance(text, str):
        found = f"{key!r} {text!r}" if key in part else f"no {key!r}"
        raise ValueError(f"{place} is a text and has {found}; expected {{'type': 'text', 'text': 'words'}}.")
    return text


def _image_of(part: Mapping, place: str):
    """Return the image of a part as it was given, None where it holds none."""
    found = {key: part[key] for key in SOURCES if part.get(key) is not None}
    if isinstance(found.get("image_url"), Mapping):
        # OpenAI's {"image_url": {"url": ..., "detail": ...}}.
        url = found["image_url"].get("url")
        if url is None:
            raise ValueError(f"{place} has an 'image_url' without a 'url'.")
        found["image_url"] = url
    if len(found) > 1:
        raise ValueError(f"{place} names its image {len(found)} times: {', '.join(found)}; give one of them.")
    if not found:
        return None
    ((key, image),) = found.items()
    return decoded_base64(image) if key == "base64" else image


def _kind(value) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
