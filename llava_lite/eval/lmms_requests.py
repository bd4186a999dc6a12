"""Turn what lmms-eval asks (messages, visuals, generation settings) into what `reply` takes.

Nothing of lmms-eval is imported here. A visual is what its tasks give: a PIL image, a path, or a dict of a sound.
"""

from __future__ import annotations

import io
import json
import os
import wave
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from llava_lite.constants import DEFAULT_IMAGE_TOKEN

DEFAULT_MAX_NEW_TOKENS = 1024
# What lmms-eval writes where a task names no end. Its own models read no `until` at all, and an answer of several
# paragraphs would end after the first.
FILLED_IN_UNTIL = ["\n\n"]
# Settings of `generate` under lmms-eval's names -> their type; those of sampling go along only where it samples.
GENERATION = {"num_beams": int, "min_new_tokens": int, "no_repeat_ngram_size": int}
GENERATION |= {"repetition_penalty": float, "length_penalty": float}
SAMPLING = {"top_p": float, "top_k": int, "min_p": float}
MAX_NEW_TOKENS = ("max_new_tokens", "max_gen_toks")
UNTIL = ("until", "stop", "stop_sequences")
# Files by their ending; other paths are videos, as for lmms-eval.
ENDINGS = dict.fromkeys((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tiff", ".webp"), "image")
ENDINGS |= dict.fromkeys((".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".opus", ".webm"), "audio")


class Asked(NamedTuple):
    """What one request asks, as `reply` takes it.

    history: earlier (question, answer) pairs; images are those of all turns, each with its `<image>` in a turn.
    media: sounds and videos by kind, for a model with ImageBind.
    """

    question: str
    images: tuple[Any, ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    media: Mapping[str, Any] = MappingProxyType({})


class Settings(NamedTuple):
    """How a request is answered. arguments: of `reply`; until: texts that end an answer; unknown: names left out."""

    arguments: dict[str, Any]
    until: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def to_settings(gen_kwargs: Mapping[str, Any], stop_at_blank_line: bool = False) -> Settings:
    """Return the settings of a request in `reply`'s words; ValueError with the name for a value of another type.

    It samples where the temperature is above 0 and do_sample is not false, at 1 if do_sample alone is given.
    stop_at_blank_line: take the end that lmms-eval fills in, an empty line, for one that the task asks for.
    """
    # YAML and --gen_kwargs make a text of None.
    given = {name: value for name, value in gen_kwargs.items() if value is not None and value != "None"}
    until = []
    for name in UNTIL:
        texts = given.pop(name, [])
        until += [texts] if isinstance(texts, str) else texts
    if until == FILLED_IN_UNTIL and not stop_at_blank_line:
        until = []
    limits = [as_number(name, given.pop(name), int) for name in MAX_NEW_TOKENS if name in given]
    arguments = {"max_new_tokens": limits[0] if limits else DEFAULT_MAX_NEW_TOKENS}
    samples = given.pop("do_sample", None)
    temperature = as_number("temperature", given.pop("temperature", 1.0 if samples else 0.0), float)
    arguments["temperature"] = 0.0 if samples is False else temperature
    arguments |= {name: as_number(name, given.pop(name), kind) for name, kind in GENERATION.items() if name in given}
    of_sampling = {name: as_number(name, given.pop(name), kind) for name, kind in SAMPLING.items() if name in given}
    if arguments["temperature"] > 0:
        arguments |= of_sampling
    return Settings(arguments, tuple(text for text in until if text), tuple(given))


def as_number(name: str, value: Any, kind: type) -> int | float:
    """Return a generation setting as its type; ValueError for what is no such number."""
    try:
        number = kind(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, bool) or (not isinstance(value, str) and number != value):
        expected = "a whole number" if kind is int else "a number"
        raise ValueError(
            f"generation setting {name}={value!r}; expected {expected}. Correct it in the task's YAML, or give "
            f"--gen_kwargs {name}=VALUE."
        )
    return number


def to_messages(text: str, visuals: Sequence[Any] | None) -> list[dict[str, Any]]:
    """Return the messages of a simple request: its visuals in front, then its text."""
    parts = [{"type": kind_of(visual), "url": visual} for visual in visuals or ()]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def kind_of(visual: Any) -> str:
    """Return the kind of a visual: image, audio or video. A dict names its own, or holds the samples of a sound."""
    if isinstance(visual, (str, os.PathLike)):
        return ENDINGS.get(os.path.splitext(visual)[1].lower(), "video")
    if isinstance(visual, Mapping):
        return visual.get("type", "audio" if "sampling_rate" in visual else "video")
    return "image"


def to_asked(messages: Sequence[Mapping[str, Any]]) -> Asked:
    """Return the question of a conversation with what was said before it.

    Images stand where the messages have them, those before all text in lines of their own, as in LLaVA. A text with
    `<image>` for each image of its message keeps it. A system message goes before the first question: the system text
    of the prompt is the checkpoint's own. Raises ValueError for messages that no conversation of this kind has.
    """
    system, turns, images, media = [], [], [], {}
    for message in messages:
        role, parts = message["role"], as_parts(message["content"])
        shown = [part["url"] for part in parts if part["type"] == "image"]
        if role == "system" and not shown:
            system.append(to_text(parts, 0))
            continue
        for part in parts:
            if part["type"] not in ("text", "image"):
                add_media(media, part)
        images += shown
        text = to_text(parts, len(shown))
        if turns and turns[-1][0] == role:
            turns[-1] = role, f"{turns[-1][1]}\n{text}"
        else:
            turns.append((role, text))
    roles = [role for role, _ in turns]
    if not turns or roles != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ValueError(
            f"messages of {', '.join(roles) or 'nobody'}; expected user and assistant in turns, the last of the user."
        )
    texts = [text for _, text in turns]
    texts[0] = "\n\n".join([*system, texts[0]])
    return Asked(texts[-1], tuple(images), tuple(zip(texts[:-1:2], texts[1::2], strict=True)), media)


def as_parts(content: Any) -> list[Mapping[str, Any]]:
    """Return the content of a message as parts; a text is one."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def to_text(parts: Sequence[Mapping[str, Any]], num_images: int) -> str:
    """Return the text of a message, with `<image>` for each of its images."""
    texts = [part["text"] for part in parts if part["type"] == "text"]
    placed = sum(text.count(DEFAULT_IMAGE_TOKEN) for text in texts)
    if placed and placed == num_images:
        return "\n".join(texts)
    if placed:
        raise ValueError(
            f"{placed} {DEFAULT_IMAGE_TOKEN} placeholders in a message with {num_images} images; expected one for "
            "each, or none. Change the task's doc_to_text or doc_to_messages."
        )
    kept = [part for part in parts if part["type"] in ("text", "image")]
    return "\n".join(part["text"] if part["type"] == "text" else DEFAULT_IMAGE_TOKEN for part in kept)


def add_media(media: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add a sound or a video to what a question is about; ValueError for a second of its kind."""
    kind = part["type"]
    if kind in media:
        raise ValueError(f"a second {kind} in a conversation; a model with ImageBind reads one of each kind.")
    media[kind] = as_media(part["url"])


def as_media(source: Any) -> Any:
    """Return a path or bytes as it is, an image or the samples of a sound as the bytes of a file."""
    if isinstance(source, Image.Image):
        file = io.BytesIO()
        source.save(file, "PNG")
        return file.getvalue()
    # The audio of `datasets`, a dict or an object of its own, answers to these two names.
    return (
        source if isinstance(source, (str, bytes, os.PathLike)) else to_wav(source["array"], source["sampling_rate"])
    )


def to_wav(samples: Any, rate: int) -> bytes:
    """Return a .wav file, 16 bit, of samples from -1 to 1: [samples], or [channels, samples], of which the first."""
    samples = np.asarray(samples)
    samples = samples if samples.ndim == 1 else samples[0]
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(int(rate))
        sound.writeframes(np.clip(np.round(samples * 32768), -32768, 32767).astype("<i2").tobytes())
    return file.getvalue()


def in_batches(contexts: Sequence[str], gen_kwargs: Sequence[Mapping[str, Any]], size: int) -> Iterator[list[int]]:
    """Yield batches of positions whose requests have the same generation settings, the longest contexts first.

    The longest come first so that memory that does not suffice shows at once.
    """
    groups: dict[str, list[int]] = {}
    for position, settings in enumerate(gen_kwargs):
        groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(position)
    for group in groups.values():
        group.sort(key=lambda position: -len(contexts[position]))
        yield from (group[start : start + size] for start in range(0, len(group), size))


def cut_at(answer: str, until: Sequence[str]) -> str:
    """Return an answer up to the first of the texts that end it."""
    ends = [answer.find(text) for text in until if text in answer]
    return answer[: min(ends)].rstrip() if ends else answer
