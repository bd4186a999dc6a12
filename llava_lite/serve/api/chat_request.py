"""Turn the body of a chat request of OpenAI's API into what it asks for; refuse what would be ignored."""

import json
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.serve.api.errors import RequestError

ROLES = ("system", "developer", "user", "assistant")
MAX_STOPS, MAX_TOP_LOGPROBS = 4, 20
# Messages of a request, and parts of a message, as in OpenAI's API.
MAX_MESSAGES = 2048
INT64 = 2**63
# Characters of a field's name that errors repeat.
LONGEST_NAME = 60
# Fields that change no answer.
WITHOUT_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
# Fields that are not supported -> the values that ask for nothing.
NEUTRAL = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
}


class Field(NamedTuple):
    """A field that is read: its default, whether a value fits, and what is expected in words."""

    default: Any
    fits: Callable[[Any], bool]
    expected: str


def is_number(low: float, high: float) -> Callable[[Any], bool]:
    """Return a check for a number between two others, both included."""
    return lambda value: type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def is_whole(low: int, high: int) -> Callable[[Any], bool]:
    """Return a check for a whole number between two others, both included."""
    return lambda value: type(value) is int and low <= value <= high


def is_flag(value) -> bool:
    """Return whether a value is true or false."""
    return isinstance(value, bool)


def is_stop(value) -> bool:
    """Return whether a value is a text, or a list of at most MAX_STOPS."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MAX_STOPS:
        return False
    return all(isinstance(text, str) and text for text in texts)


def is_options(value) -> bool:
    """Return whether a value is stream_options with the one option that there is."""
    return isinstance(value, dict) and set(value) <= {"include_usage"} and all(map(is_flag, value.values()))


TOKENS = Field(None, is_whole(1, INT64 - 1), "a number of tokens, 1 or more")
FIELDS = {
    "model": Field(None, lambda value: isinstance(value, str), "the name of a model, a text"),
    "messages": Field(None, lambda value: isinstance(value, list) and bool(value), "a list of messages"),
    "max_tokens": TOKENS,
    "max_completion_tokens": TOKENS,
    "temperature": Field(1.0, is_number(0, 2), "a number from 0 to 2"),
    "top_p": Field(1.0, is_number(0, 1), "a number from 0 to 1"),
    "n": Field(1, is_whole(1, 128), "a whole number from 1 to 128"),
    "stream": Field(False, is_flag, "true or false"),
    "stream_options": Field({}, is_options, '{"include_usage": true or false}'),
    "stop": Field([], is_stop, f"a text, or a list of at most {MAX_STOPS} texts, none of them empty"),
    "seed": Field(None, is_whole(-INT64, INT64 - 1), "a whole number of 64 bits"),
    "logprobs": Field(False, is_flag, "true or false"),
    "top_logprobs": Field(0, is_whole(0, MAX_TOP_LOGPROBS), f"a whole number from 0 to {MAX_TOP_LOGPROBS}"),
}


class ImageURL(NamedTuple):
    """An image of a message, not read yet. place: its name in errors."""

    url: str
    place: str


@dataclass(frozen=True)
class ChatRequest:
    """What a request asks for.

    messages: (role, parts), a part being a text or an ImageURL. max_tokens: None where the request names none.
    seed: of the first answer; the next has the next seed. num_top: None for no logprobs.
    """

    model: str
    messages: list[tuple[str, list]]
    max_tokens: int | None
    temperature: float
    top_p: float
    n: int
    stream: bool
    include_usage: bool
    stops: tuple[str, ...]
    seed: int
    num_top: int | None

    @classmethod
    def read(cls, body) -> "ChatRequest":
        """Return what the JSON of a request asks for; RequestError for anything that would be ignored or is wrong."""
        if not isinstance(body, dict):
            raise RequestError("The body is no JSON object; expected the fields of a chat request.")
        # Clients write null for what they leave out.
        body = {name: value for name, value in body.items() if value is not None}
        check_known(body)
        values = {name: read_field(name, field, body) for name, field in FIELDS.items()}
        for name in ("model", "messages"):
            if values[name] is None:
                raise RequestError(f"{name} is missing; expected {FIELDS[name].expected}.", param=name)
        limits = {values["max_tokens"], values["max_completion_tokens"]} - {None}
        if len(limits) > 1:
            message = "max_tokens and max_completion_tokens differ; give one of them."
            raise RequestError(message, param="max_completion_tokens")
        if values["top_logprobs"] and not values["logprobs"]:
            raise RequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
        if "stream_options" in body and not values["stream"]:
            raise RequestError("stream_options needs stream: true.", param="stream_options")
        stop, seed = values["stop"], values["seed"]
        return cls(
            model=values["model"],
            messages=read_messages(values["messages"]),
            max_tokens=next(iter(limits), None),
            temperature=float(values["temperature"]),
            top_p=float(values["top_p"]),
            n=values["n"],
            stream=values["stream"],
            include_usage=values["stream_options"].get("include_usage", False),
            stops=(stop,) if isinstance(stop, str) else tuple(stop),
            seed=secrets.randbelow(INT64) if seed is None else seed,
            num_top=values["top_logprobs"] if values["logprobs"] else None,
        )

    def images(self) -> list[ImageURL]:
        """Return the images of all messages, in order."""
        return [part for _, parts in self.messages for part in parts if isinstance(part, ImageURL)]

    def texts(self) -> list[str]:
        """Return the texts of all messages, in order."""
        return [part for _, parts in self.messages for part in parts if isinstance(part, str)]

    def without_messages(self) -> "ChatRequest":
        """Return what is needed while the answer is generated; images may be large."""
        return replace(self, messages=[])

    def seeds(self) -> list[int]:
        """Return the seed of each answer."""
        return [(self.seed + i + INT64) % (2 * INT64) - INT64 for i in range(self.n)]


def check_known(body: dict) -> None:
    """Raise RequestError for a field that is unknown, or that asks for what is not supported."""
    for name, value in body.items():
        if name in FIELDS or name in WITHOUT_EFFECT:
            continue
        if name not in NEUTRAL:
            known = ", ".join(FIELDS)
            message = f"Unknown field {shorten(name)}; known: {known}."
            raise RequestError(message, param=name[:LONGEST_NAME], code="unknown_parameter")
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in NEUTRAL[name]):
            message = f"{name} is not supported: this server would ignore it. Leave it out."
            raise RequestError(message, param=name, code="unsupported_parameter")


def read_field(name: str, field: Field, body: dict):
    """Return the value of a field, or its default; RequestError for a wrong one."""
    if name not in body:
        return field.default
    if not field.fits(body[name]):
        message = f"{name} is {shorten(body[name])}; expected {field.expected}."
        raise RequestError(message, param=name, code="invalid_value")
    return body[name]


def read_messages(messages: list) -> list[tuple[str, list]]:
    """Return (role, parts) of each message; the last one is the user's."""
    check_number(messages, "messages")
    read = [read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if read[-1][0] != "user":
        message = f"The last message is of the role {shorten(read[-1][0])}; expected 'user', whom the model answers."
        raise RequestError(message, param="messages")
    return read


def check_number(entries: list, place: str) -> None:
    """Raise RequestError for more messages, or parts of a message, than are taken."""
    if len(entries) > MAX_MESSAGES:
        message = f"{place} has {len(entries):,} entries; expected at most {MAX_MESSAGES:,}."
        raise RequestError(message, param=place, code="array_above_max_length")


def read_message(message, place: str) -> tuple[str, list]:
    """Return (role, parts) of a message."""
    if not isinstance(message, dict):
        raise RequestError(f"{place} is {shorten(message)}; expected an object with role and content.", param=place)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        found = shorten(role) if "role" in message else "missing"
        raise RequestError(f"{place}.role is {found}; known: {', '.join(ROLES)}.", param=f"{place}.role")
    ignored = (key for key in message if key not in ("role", "content") and message[key] not in (None, [], {}))
    if (name := next(ignored, None)) is not None:
        name = name[:LONGEST_NAME]
        message = f"{place}.{name} is not supported: this server would ignore it. Leave it out."
        raise RequestError(message, param=f"{place}.{name}", code="unsupported_parameter")
    found = shorten(content) if "content" in message else "missing"
    place = f"{place}.content"
    if isinstance(content, str):
        return role, [read_text(content, place)]
    if not isinstance(content, list) or not content:
        raise RequestError(f"{place} is {found}; expected a text or a list of parts, 1 or more.", param=place)
    check_number(content, place)
    return role, [read_part(part, f"{place}[{i}]", role) for i, part in enumerate(content)]


def read_part(part, place: str, role: str) -> str | ImageURL:
    """Return a part of a message, a text or an image."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str) and set(part) == {"type", "text"}:
        return read_text(part["text"], place)
    image = part.get("image_url") if kind == "image_url" else None
    if not isinstance(image, dict) or not isinstance(image.get("url"), str) or set(part) != {"type", "image_url"}:
        expected = '{"type": "text", "text": "..."} or {"type": "image_url", "image_url": {"url": "data:..."}}'
        raise RequestError(f"{place} is {shorten(part)}; expected {expected}.", param=place)
    if image.get("detail") not in (None, "auto") or set(image) - {"url", "detail"}:
        message = f"{place}.image_url has {shorten({key: image[key] for key in image if key != 'url'})}; this server "
        message += "shows every image as the model was trained (detail: auto)."
        raise RequestError(message, param=place, code="unsupported_parameter")
    if role != "user":
        raise RequestError(f"{place} is an image in a message of the {role}; only users show images.", param=place)
    return ImageURL(image["url"], place)


def read_text(text: str, place: str) -> str:
    """Return a text; RequestError for one that holds an image placeholder, which would be taken for an image."""
    if DEFAULT_IMAGE_TOKEN in text:
        message = f"{place} holds {DEFAULT_IMAGE_TOKEN}, the model's placeholder; give images as image_url parts."
        raise RequestError(message, param=place)
    return text


def shorten(value, longest: int = 60) -> str:
    """Return a value as messages show it: as the JSON that was sent."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= longest else f"{text[:longest]}..."
