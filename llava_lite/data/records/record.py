"""Turn the objects of annotation files into records: turns of a conversation, and its images.

LLaVA's record is `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}`; turns.py and formats.py
read other spellings and formats.
"""

import math
import re
from typing import NamedTuple

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.conversation.layout import check_speakers
from llava_lite.data.errors import DataError
from llava_lite.data.records.content import read_content
from llava_lite.data.records.image_values import INLINE_STARTS, describe, read_images
from llava_lite.data.records.keys import rewriting
from llava_lite.data.records.media import MediaMix, get_mixes
from llava_lite.data.records.turns import drop_greeting, plain_turns

# A record with only these keys is LLaVA's own: it can be read in one way only.
PLAIN_KEYS = frozenset({"id", "image", "conversations", "model"})
PLACEHOLDER_FLAG = "--placeholder_as_text"
NOTHING: frozenset[int] = frozenset()
# Image placeholders of other families in a question (Qwen-VL, Phi-3, InternVL, XComposer, Gemma, MMMU).
_PLACEHOLDER = r"""<\|(?:image|video|audio)(?:_\d+|_pad|_placeholder)?\|> | <img>[^<>\n]+</img> | <image[ _-]?\d+>
    | <ImageHere> | <IMG_CONTEXT> | <image_soft_token> | <start_of_image> | <image_placeholder>"""
# Tags that HTML and prose use too are placeholders at the start of a question, and at its end on their own line.
_TAG = rf"(?!(?-i:{DEFAULT_IMAGE_TOKEN}))(?:<\ ?(?:image|img|picture|video|audio)\ ?/?>|\[(?:image|img)\])"
OTHER_PLACEHOLDER = re.compile(rf"{_PLACEHOLDER} | \A\s*{_TAG} | \n[ \t]*{_TAG}\s*\Z", re.VERBOSE | re.IGNORECASE)


class Record(NamedTuple):
    """One conversation and its images, in the order of their `<image>` placeholders.

    images: paths below `image_folder`, the bytes of image files that the record itself holds, or a MediaMix, media
    that together are one image.
    """

    id: str
    images: tuple[str | bytes | MediaMix, ...]
    turns: tuple[tuple[str, str], ...]  # ("human" | "gpt", text), human first, alternating
    where: str = ""  # "train.json[17]": the file and the position, counted from 0
    image_folder: str | None = None
    system: str | None = None  # replaces the system text of the template; None keeps that
    not_supervised: frozenset[int] = frozenset()  # positions in `turns` of answers that carry no labels
    template: str | None = None  # its conversation template; None for that of the run

    @property
    def name(self) -> str:
        """The record's id and position, for messages."""
        return f"record {self.id!r} ({self.where})"


def _record_id(item: dict, where: str) -> str:
    """Return the id as a string; public files have numbers too. Without an id it is the position."""
    value = item.get("id")
    if value is None:
        return where
    if isinstance(value, str):
        return value
    # Not math.isfinite of an integer, which may be larger than every float. A bool is an int, and no id.
    if type(value) is int:
        return str(value)
    if not isinstance(value, float) or not math.isfinite(value):
        raise DataError(f"{where}: 'id' is {describe(value)}, expected a string or a number.")
    return str(int(value)) if value.is_integer() else str(value)


def parse_record(item: dict, where: str, image_folder: str | None = None) -> Record:
    """Return the Record of one object: LLaVA's, or one of the other formats that are read directly.

    There must be as many image placeholders as images, all in questions: LLaVA drops the surplus, or crashes in the
    middle of an epoch. A record with placeholders and no image at all is accepted here: see missing_images. Raises
    DataError with the name and the position of the record.
    """
    if not isinstance(item, dict):
        raise DataError(f"{where} is {describe(item)}, expected an object with 'conversations'.")
    record_id = _record_id(item, where)
    name = f"record {record_id!r} ({where})"
    # LLaVA's own records, of which there are millions, are read directly; all others by read_content.
    turns = plain_turns(item.get("conversations"), name) if item.keys() <= PLAIN_KEYS else None
    if turns:
        image, system, not_supervised = item.get("image"), None, NOTHING
        is_path = type(image) is str and image and not image.startswith(INLINE_STARTS)
        images = (image,) if is_path else read_images(image, "image", name)
    else:
        images, turns, system, not_supervised = _other_spelling(item, name)
    if images:
        _check_placeholders(turns, images, name)
    return Record(record_id, images, tuple(turns), where, image_folder, system, not_supervised)


def _other_spelling(item: dict, name: str):
    """Return images, alternating turns, system text and unsupervised positions of a record in any known spelling."""
    content = read_content(item, name)
    dialogue = drop_greeting(content.dialogue)
    try:
        check_speakers(dialogue.turns)
    except ValueError as error:
        raise DataError(f"{name}: {error}") from None
    if not dialogue.turns:
        what = "only one turn from gpt, which is dropped" if dialogue.num_dropped else "no question and no answer"
        raise DataError(f"{name} has {what}; no turn remains.")
    return content.images, dialogue.turns, dialogue.system, dialogue.not_supervised


def _check_placeholders(turns, images: tuple, name: str) -> None:
    counts, num_images = [text.count(DEFAULT_IMAGE_TOKEN) for _, text in turns], len(images)
    if any(get_mixes(images)) and sum(counts) != 1:
        raise DataError(
            f"{sum(counts)} {DEFAULT_IMAGE_TOKEN} placeholders in the conversation of {name}; all its media "
            f"({', '.join(images[0].kinds)}) together are one image: write {DEFAULT_IMAGE_TOKEN} once, in a question."
        )
    if not sum(counts):
        raise DataError(
            f"0 {DEFAULT_IMAGE_TOKEN} placeholders in the conversation but {num_images} images in {name}. Write one "
            "for each image, remove the images, or put them before the first question: "
            f"{rewriting(name, '--images_first')}"
        )
    if sum(counts) != num_images:
        advice = "Remove a placeholder or add an image." if sum(counts) > num_images else (
            "Add a placeholder or remove an image."
        )  # fmt: skip
        raise DataError(
            f"{sum(counts)} {DEFAULT_IMAGE_TOKEN} placeholders in the conversation but {num_images} images in {name}. "
            f"{advice}"
        )
    if any(counts[1::2]):
        raise DataError(
            f"{name}: an answer has {DEFAULT_IMAGE_TOKEN}, so its question comes before the image. Move it into a "
            "question."
        )


def num_missing_images(record: Record) -> int:
    """Return the number of image placeholders of a record that has no image; 0 for one that has."""
    if record.images:
        return 0
    return sum(text.count(DEFAULT_IMAGE_TOKEN) for _, text in record.turns) + len(_other_placeholders(record))


def _other_placeholders(record: Record) -> list[str]:
    """Return the image placeholders of other families in the questions of a record."""
    questions = (text for _, text in record.turns[::2] if "<" in text or "[" in text)
    return [found.strip() for text in questions for found in OTHER_PLACEHOLDER.findall(text)]


def num_empty_answers(record: Record) -> int:
    """Return the number of supervised answers without text, of which only the end token is supervised."""
    count = 0
    for _, text in record.turns[1::2]:
        if not text or text.isspace():
            count += 1
    if not (count and record.not_supervised):
        return count
    answers = range(1, len(record.turns), 2)
    return sum(i not in record.not_supervised and not record.turns[i][1].strip() for i in answers)


def missing_images(record: Record) -> str | None:
    """Return why a record with image placeholders and no image cannot be used; None for any other record.

    LLaVA uses these placeholders as text, and trains on answers about an image that is not there.
    """
    count = num_missing_images(record)
    if not count:
        return None
    others = _other_placeholders(record)
    if len(others) == count:
        return (
            f"{others[0]!r} in a question but no image in {record.name}: it is a placeholder of other programs. Name "
            f"the image under 'image' and write {DEFAULT_IMAGE_TOKEN} here, or remove the placeholder from the text; "
            f"if it is plain text: {PLACEHOLDER_FLAG} True."
        )
    return (
        f"{count} {DEFAULT_IMAGE_TOKEN} placeholder{'s' * (count > 1)} in the conversation but no image in "
        f"{record.name}. Name the image under 'image', or remove the placeholder from the text; if it is plain text: "
        f"{PLACEHOLDER_FLAG} True."
    )
