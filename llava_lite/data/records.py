"""Turn the objects of annotation files into Records: who says what, and about which images.

The record is LLaVA's, `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}`; other spellings and
formats are read by turns.py and record_formats.py.
"""

import json
import math
import re
from typing import NamedTuple

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.data.image_values import INLINE_STARTS, describe, read_images
from llava_lite.data.record_content import read_content
from llava_lite.data.record_keys import rewriting
from llava_lite.data.scan import DataError
from llava_lite.data.turns import ROLES, drop_greeting, plain_turns

# A record with these keys alone is LLaVA's own: nothing in it could be read another way.
PLAIN_KEYS = frozenset({"id", "image", "conversations", "model"})
PLACEHOLDER_FLAG = "--placeholder_as_text"
NOTHING: frozenset[int] = frozenset()
# How other families mark an image in a question (Qwen-VL, Phi-3, InternVL, XComposer, Gemma, MMMU).
_MARK = r"""<\|(?:image|video|audio)(?:_\d+|_pad|_placeholder)?\|> | <img>[^<>\n]+</img> | <image[ _-]?\d+>
    | <ImageHere> | <IMG_CONTEXT> | <image_soft_token> | <start_of_image> | <image_placeholder>"""
# What HTML and prose hold as well is a mark where a question begins with it, or ends with it on a line of its own.
_TAG = rf"(?!(?-i:{DEFAULT_IMAGE_TOKEN}))(?:<\ ?(?:image|img|picture|video|audio)\ ?/?>|\[(?:image|img)\])"
OTHER_MARK = re.compile(rf"{_MARK} | \A\s*{_TAG} | \n[ \t]*{_TAG}\s*\Z", re.VERBOSE | re.IGNORECASE)


class Record(NamedTuple):
    """One conversation and its images, in the order of their <image> placeholders.

    images: paths below `image_folder`, or the content of image files that the record itself holds, as bytes.
    """

    id: str
    images: tuple[str | bytes, ...]
    turns: tuple[tuple[str, str], ...]  # ("human" | "gpt", text), human first, alternating
    where: str = ""  # "train.json[17]": the file and the position, counted from 0
    image_folder: str | None = None
    system: str | None = None  # replaces the system text of the template; None keeps that
    not_supervised: frozenset[int] = frozenset()  # positions in `turns` of answers that carry no labels

    @property
    def name(self) -> str:
        """Words that let a person find this record."""
        return f"record {self.id!r} ({self.where})"


def _record_id(item: dict, where: str) -> str:
    """Return the id as a string: public files hold numbers too; a record without one is known by its place."""
    value = item.get("id")
    if value is None:
        return where
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{where}: 'id' is {describe(value)}, expected a string or a number.")
    return str(int(value)) if value == int(value) else str(value)


def parse_record(item: dict, where: str, image_folder: str | None = None) -> Record:
    """Return the Record of one object: LLaVA's, or one of the other formats that are read directly.

    As many image placeholders as images, all of them in questions: LLaVA drops what is too much, or crashes in the
    middle of an epoch. A record that has placeholders and no image at all is returned as it is: see missing_images.
    Raises DataError naming the record and its place.
    """
    if not isinstance(item, dict):
        raise DataError(f"{where} is {describe(item)}, expected an object with 'conversations'.")
    record_id = _record_id(item, where)
    name = f"record {record_id!r} ({where})"
    # LLaVA's own records, of which there are millions, take the short way; everything else goes through read_content.
    turns = plain_turns(item.get("conversations"), name) if item.keys() <= PLAIN_KEYS else None
    if turns:
        image, system, not_supervised = item.get("image"), None, NOTHING
        is_path = type(image) is str and image and not image.startswith(INLINE_STARTS)
        images = (image,) if is_path else read_images(image, "image", name)
    else:
        images, turns, system, not_supervised = _other_spelling(item, name)
    if images:
        _check_placeholders(turns, len(images), name)
    return Record(record_id, images, tuple(turns), where, image_folder, system, not_supervised)


def _other_spelling(item: dict, name: str):
    """Return images, alternating turns, system text and unsupervised positions of a record in any known spelling."""
    content = read_content(item, name)
    dialogue = drop_greeting(content.dialogue)
    for position, (role, _) in enumerate(dialogue.turns):
        if role != ROLES[position % 2]:
            raise DataError(
                f"{name}: turn {position} is from {role!r}, expected {ROLES[position % 2]!r}: human and gpt alternate."
            )
    if not dialogue.turns:
        what = "only one turn from gpt, which is dropped" if dialogue.num_dropped else "no question and no answer"
        raise DataError(f"{name} holds {what}; nothing remains.")
    return content.images, dialogue.turns, dialogue.system, dialogue.not_supervised


def _check_placeholders(turns, num_images: int, name: str) -> None:
    counts = [text.count(DEFAULT_IMAGE_TOKEN) for _, text in turns]
    if not sum(counts):
        raise DataError(
            f"0 {DEFAULT_IMAGE_TOKEN} placeholders in the conversation but {num_images} images in {name}. Write one "
            "where each image stands, remove the images, or put them in front of the first question: "
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
            f"{name}: an answer holds {DEFAULT_IMAGE_TOKEN}, so that its question is asked before the image is seen. "
            "Move it into a question."
        )


def num_missing_images(record: Record) -> int:
    """Return the number of image placeholders of a record that has no image; 0 for one that has."""
    if record.images:
        return 0
    return sum(text.count(DEFAULT_IMAGE_TOKEN) for _, text in record.turns) + len(_other_marks(record))


def _other_marks(record: Record) -> list[str]:
    """Return what marks an image in other families, in the questions of a record."""
    questions = (text for _, text in record.turns[::2] if "<" in text or "[" in text)
    return [mark.strip() for text in questions for mark in OTHER_MARK.findall(text)]


def num_empty_answers(record: Record) -> int:
    """Return the number of supervised answers without text, of which only the end mark is learned."""
    count = 0
    for _, text in record.turns[1::2]:
        if not text or text.isspace():
            count += 1
    if not (count and record.not_supervised):
        return count
    answers = range(1, len(record.turns), 2)
    return sum(i not in record.not_supervised and not record.turns[i][1].strip() for i in answers)


def missing_images(record: Record) -> str | None:
    """Return why a record cannot be used that has image placeholders and no image; None for any other.

    LLaVA takes these placeholders for text, and whatever the image was to show is learned blind.
    """
    count = num_missing_images(record)
    if not count:
        return None
    others = _other_marks(record)
    if len(others) == count:
        return (
            f"{others[0]!r} in a question but no image in {record.name}: other programs put media there. Name the "
            f"image under 'image' and write {DEFAULT_IMAGE_TOKEN} here, or take the mark out of the text; if it is "
            f"plain text: {PLACEHOLDER_FLAG} True."
        )
    return (
        f"{count} {DEFAULT_IMAGE_TOKEN} placeholder{'s' * (count > 1)} in the conversation but no image in "
        f"{record.name}. Name the image under 'image', or take the placeholder out of the text; if it is plain text: "
        f"{PLACEHOLDER_FLAG} True."
    )


def parse_json_record(data: bytes, where: str, image_folder: str | None = None) -> Record:
    """Return the Record of one JSON object in bytes; a syntax error stays json's own, for the caller to place."""
    return parse_record(json.loads(data), where, image_folder)
