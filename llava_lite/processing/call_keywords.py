"""Sort the keywords of a processor's call: text, images, template; an unknown name is an error.

transformers' own processors warn of such a name, or hand it on to a template that never asks for it.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches

from transformers.processing_utils import TextKwargs

from llava_lite.media.preprocess import image_side
from llava_lite.processing.padding import check_choices

# Keywords in dicts of their own, as transformers' processors take them too.
NESTED = ("text_kwargs", "images_kwargs", "common_kwargs")
# What the Auto classes, pipelines and Trainers hand on, and no processor needs.
IGNORED = ("verbose", "streamer")
# Fields that identify an image processor.
NOT_SETTINGS = ("image_processor_type", "processor_class", "feature_extractor_type", "auto_map", "backend")


class UnknownKeyword(TypeError, ValueError):
    """A keyword that nobody takes: TypeError as Python raises it, ValueError as everything that a person can mend."""


@dataclass
class CallKeywords:
    """The keywords of one call, each with what its absence means. images: settings of the image processor."""

    padding: bool | str = True
    padding_side: str = "left"
    truncation: bool | str = False
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str | None = "pt"
    add_special_tokens: bool | None = None
    return_attention_mask: bool = True
    return_token_type_ids: bool = False
    return_mm_token_type_ids: bool = False
    return_assistant_tokens_mask: bool = False
    images: dict = field(default_factory=dict)

    @classmethod
    def read(cls, given: dict, image_processor) -> "CallKeywords":
        """Return the keywords of a call; UnknownKeyword for a name that is none of them."""
        flat = flattened(given)
        known, settings = text_keywords(), image_settings(image_processor)
        for name in flat:
            if name not in known and name not in settings:
                check_unknown(name, (*known, *settings, *NESTED), _reason(name, image_processor))
        text = {name: value for name, value in flat.items() if name in known}
        # In transformers None means the default; for return_tensors it means lists.
        text = {name: value for name, value in text.items() if value is not None or name == "return_tensors"}
        found = cls(**text, images={name: value for name, value in flat.items() if name in settings})
        found.return_tensors = getattr(found.return_tensors, "value", found.return_tensors)
        check_choices(found.padding, found.truncation, found.max_length, found.padding_side, found.return_tensors)
        multiple = found.pad_to_multiple_of
        if multiple is not None and (isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1):
            raise ValueError(f"pad_to_multiple_of is {multiple!r}; expected a number of tokens.")
        return found


def text_keywords() -> tuple[str, ...]:
    """Return the names of the keywords that are about text."""
    return tuple(one.name for one in fields(CallKeywords) if one.name != "images")


def call_names(image_processor) -> set[str]:
    """Return every name that a call takes."""
    return {
        *text_keywords(),
        *image_settings(image_processor),
        *NESTED,
        *IGNORED,
        "images",
        *TextKwargs.__annotations__,
    }


def image_settings(image_processor) -> tuple[str, ...]:
    """Return the names of an image processor's settings, none for a model that does not see."""
    if image_processor is None:
        return ()
    return tuple(name for name in image_processor.to_dict() if name not in NOT_SETTINGS and not name.startswith("_"))


def flattened(given: dict) -> dict:
    """Return keywords without the dicts of NESTED; ValueError for one that is given twice."""
    flat = {}
    for name, value in given.items():
        if name in IGNORED:
            continue
        if name in ("videos_kwargs", "audio_kwargs"):
            if value:
                raise ValueError(f"{name}: the model sees images alone; videos and audio are not for it.")
            continue
        if name in NESTED and not isinstance(value, Mapping):
            raise ValueError(f"{name} is a dict of keywords; got {value!r}.")
        for inner, one in value.items() if name in NESTED else [(name, value)]:
            if inner in flat and flat[inner] is not one and flat[inner] != one:
                raise ValueError(f"{inner} is given twice, as {flat[inner]!r} and as {one!r}.")
            flat[inner] = one
    return flat


def with_settings(image_processor, settings: dict):
    """Return a copy of an image processor with other settings; ValueError if the tower could not read its pixels."""
    if not settings:
        return image_processor
    known = {name: value for name, value in image_processor.to_dict().items() if name not in NOT_SETTINGS}
    made = type(image_processor)(**{**copy.deepcopy(known), **settings})
    side, own = image_side(made), image_side(image_processor)
    if side != own:
        raise ValueError(
            f"{', '.join(settings)}: images would have {side} pixels a side, the vision tower reads {own}."
        )
    return made


def check_unknown(name: str, known, reason: str = "") -> None:
    """Raise UnknownKeyword, with the name that was probably meant."""
    near = get_close_matches(name, sorted({*known} - {name}), n=1, cutoff=0.75)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnknownKeyword(f"unknown keyword {name!r}{reason}.{hint}")


def _reason(name: str, image_processor) -> str:
    if name in TextKwargs.__annotations__:
        return ": transformers' tokenizers have it, this processor has not"
    if image_processor is None and name.startswith(("do_", "image_", "crop_")):
        return ": the model has no vision tower, so there is no image processor to take it"
    return ""
