"""Read role-and-content messages, in the spellings of transformers and of OpenAI, as roles, texts and images.

The accepted spellings are those of inference servers (vLLM, SGLang). What a template would lose is an error here that
names conversation, message and part.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.conversation.images import as_list
from llava_lite.media.image import decode_base64

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Types of parts, also of OpenAI's two interfaces, and the keys of a part's image.
TEXTS = ("text", "input_text", "output_text")
IMAGES = ("image", "image_url", "input_image")
KNOWN_TYPES = ("text", "image", "image_url", "input_text", "input_image", "output_text")
SOURCES = ("image", "path", "url", "base64", "image_url")
# ShareGPT's roles, suggested in errors.
SHAREGPT = {"human": "user", "gpt": "assistant"}


class Part(NamedTuple):
    """A part of a message: a text, or an image as the caller gave it (None: it is given separately)."""

    text: str | None
    image: Any = None

    @property
    def is_image(self) -> bool:
        """Whether this part is an image."""
        return self.text is None


class Message(NamedTuple):
    """A message of one role. content: parts, or one text; more: the other keys of the message, such as tool_calls."""

    role: str
    content: str | tuple[Part, ...]
    more: dict

    @property
    def parts(self) -> tuple[Part, ...]:
        """The content as parts."""
        return (Part(self.content),) if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """The content as one text, with an image placeholder for each image part."""
        return "\n".join(DEFAULT_IMAGE_TOKEN if part.is_image else part.text for part in self.parts)

    @property
    def images(self) -> list:
        """The images in order, None for one that is given separately."""
        return [part.image for part in self.parts if part.is_image]

    @property
    def places(self) -> list:
        """The images and the placeholders in texts, in order; None for one that is given separately."""
        places = []
        for part in self.parts:
            places += [part.image] if part.is_image else [None] * part.text.count(DEFAULT_IMAGE_TOKEN)
        return places

    def as_dict(self, in_parts: bool) -> dict:
        """Return the message for a chat template; in_parts: texts as parts too, which some templates require."""
        if self.content == "" and self.more.get("tool_calls"):
            # Templates write a null as "None", and handle a missing key.
            return {"role": self.role, **self.more}
        if not in_parts:
            return {"role": self.role, "content": self.text, **self.more}
        content = [{"type": "image"} if part.is_image else {"type": "text", "text": part.text} for part in self.parts]
        return {"role": self.role, "content": content, **self.more}


def read_conversations(conversation) -> tuple[list[list[Message]], bool]:
    """Return (conversations, is a list of conversations) of messages, or of a list of lists of messages.

    Raises ValueError with the position of anything that is not a message.
    """
    conversation = getattr(conversation, "messages", conversation)
    if not isinstance(conversation, (list, tuple)):
        keys = f" with {', '.join(map(repr, conversation))}" if isinstance(conversation, Mapping) else ""
        hint = ". Give its 'messages'" if "messages" in keys else ""
        raise ValueError(
            f"a conversation is a list of messages, {{'role': ..., 'content': ...}}; got {_kind(conversation)}{keys}"
            f"{hint}."
        )
    if not conversation:
        raise ValueError("the conversation is empty; give at least one user message.")
    nested = [isinstance(getattr(one, "messages", one), (list, tuple)) for one in conversation]
    if any(nested) and not all(nested):
        raise ValueError(
            "some entries of the conversation are messages and others are lists of messages; give one kind."
        )
    if not nested[0]:
        return [_read_messages(conversation, "")], False
    several = [getattr(one, "messages", one) for one in conversation]
    for i, messages in enumerate(several):
        if not messages:
            raise ValueError(f"conversation {i + 1} is empty; give at least one user message.")
    return [_read_messages(messages, f"conversation {i + 1}, ") for i, messages in enumerate(several)], True


def with_images(conversations: list[list[Message]], images) -> list[list]:
    """Return the images of each conversation; those of `images` fill parts and placeholders without an image.

    images: None, all in order, or one list for each conversation. Raises ValueError if they are too few or too many.
    """
    if images is None:
        own = [[image for message in conversation for image in message.images] for conversation in conversations]
        for i, group in enumerate(own):
            if count := sum(image is None for image in group):
                raise ValueError(
                    f"{count} image parts of conversation {i + 1} have no image; give one of "
                    f"{', '.join(SOURCES[:4])} in the part, or images= beside the messages."
                )
        return own
    places = [[image for message in conversation for image in message.places] for conversation in conversations]
    groups = as_list(images)
    if any(group is None or isinstance(group, (list, tuple)) for group in groups):
        groups = [as_list(group) for group in groups]
        if len(groups) != len(conversations):
            raise ValueError(
                f"{len(groups)} lists of images for {len(conversations)} conversations; give one for each."
            )
    else:
        wanted = [sum(image is None for image in found) for found in places]
        if sum(wanted) != len(groups):
            raise ValueError(
                f"{len(groups)} images for {sum(wanted)} empty placeholders in {len(conversations)} conversations."
            )
        rest = iter(groups)
        groups = [[next(rest) for _ in range(count)] for count in wanted]
    return [_filled(found, group, i) for i, (found, group) in enumerate(zip(places, groups, strict=True))]


def _filled(places: list, given: list, i: int) -> list:
    """Return a conversation's images in order; the given ones fill the places without an image."""
    left = len(given) - sum(image is None for image in places)
    if left < 0:
        raise ValueError(f"{len(given)} images are too few for the placeholders of conversation {i + 1}.")
    if left > 0:
        raise ValueError(f"{left} of the {len(given)} images have no placeholder in conversation {i + 1}.")
    rest = iter(given)
    return [next(rest) if image is None else image for image in places]


def _read_messages(messages, place: str) -> list[Message]:
    return [_read_message(message, f"{place}message {i + 1}") for i, message in enumerate(messages)]


def _read_message(message, place: str) -> Message:
    """Return one message; place: its name in errors."""
    if not isinstance(message, Mapping) and hasattr(message, "role") and hasattr(message, "content"):
        # OpenAI's client returns such objects.
        dumped = message.model_dump() if hasattr(message, "model_dump") else vars(message)
        message = {key: value for key, value in dumped.items() if value is not None}
    if not isinstance(message, Mapping):
        raise ValueError(f"{place} is {_kind(message)}; expected {{'role': ..., 'content': ...}}.")
    if "role" not in message:
        hint = " 'from' and 'value' are ShareGPT's keys." if "from" in message else ""
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
    if kind in TEXTS:
        return Part(_get_text(part, place))
    if kind in IMAGES:
        return Part(None, _get_image(part, place))
    raise ValueError(f"{place} has the type {kind!r}; known: {', '.join(KNOWN_TYPES)}.")


def _guessed_type(part: Mapping, place: str) -> str:
    """Return the type of a part without 'type', if its keys determine it, as servers do."""
    found = [name for name in ("text", "image", "image_url") if part.get(name) is not None]
    if len(found) != 1:
        raise ValueError(f"{place} has no 'type', only {', '.join(map(repr, part)) or 'nothing'}.")
    return found[0]


def _get_text(part: Mapping, place: str) -> str:
    text = part.get("text")
    if not isinstance(text, str):
        found = f"'text' {text!r}" if "text" in part else "no 'text'"
        raise ValueError(f"{place} is a text and has {found}; expected {{'type': 'text', 'text': '...'}}.")
    return text


def _get_image(part: Mapping, place: str):
    """Return the image of a part as it was given, None if it has none."""
    found = {key: part[key] for key in SOURCES if part.get(key) is not None}
    if isinstance(found.get("image_url"), Mapping):
        # OpenAI's {"image_url": {"url": ..., "detail": ...}}.
        url = found["image_url"].get("url")
        if url is None:
            raise ValueError(f"{place} has an 'image_url' without a 'url'.")
        found["image_url"] = url
    if len(found) > 1:
        raise ValueError(f"{place} has {len(found)} images: {', '.join(found)}; give one of them.")
    if not found:
        return None
    ((key, image),) = found.items()
    return decode_base64(image) if key == "base64" else image


def _kind(value) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
