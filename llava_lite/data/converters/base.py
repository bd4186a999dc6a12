"""The options of a conversion, and what its readers yield."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.conversation.layout import put_images_first
from llava_lite.data.errors import DataError

ANSWER_CHOICES = ("all", "first", "majority")


class Found(NamedTuple):
    """An object that a reader found: a record for parse_record, or the reason why it is left out."""

    where: str  # "captions.json[17]"
    item: dict | None
    reason: str = ""


@dataclass
class Options:
    """The options of the command; its readers add counts to `notes` and sentences to `remarks`.

    answers: which of several answers or captions are used. image_key: the keys or columns of the images, in order.
    drop: keys or columns to leave out. image_name: a pattern that makes a file name of a value,
    `COCO_train2014_{:012d}.jpg`. image_prefix: added before paths. annotations: the file of answers of a VQA data set.
    dataset: a name in LLaMA-Factory's dataset_info. columns: of a table without a header. question: asked about an
    image with a caption.
    """

    image_folder: str | None = None
    answers: Literal["all", "first", "majority"] | None = None
    image_key: list[str] | None = None
    drop: list[str] | None = None
    image_name: str | None = None
    image_prefix: str = ""
    images_first: bool = False
    annotations: str | None = None
    dataset: str | None = None
    columns: list[str] | None = None
    question: str = ""
    notes: Counter = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)


def pick_answers(answers: list[str], options: Options, name: str, what: str = "answers") -> list[str]:
    """Return the answers to use, equal ones once; DataError if there are several and --answers is not given.

    majority: the most frequent one; the first of equally frequent ones.
    """
    counts = Counter(answers)
    if len(counts) < 2:
        return list(counts)
    if options.answers is None:
        raise DataError(
            f"{name} has {len(counts)} different {what}: {', '.join(map(repr, list(counts)[:3]))}... Choose: "
            "--answers all (a record each), first, or majority (the most frequent)."
        )
    taken = {"all": list(counts), "first": answers[:1], "majority": [counts.most_common(1)[0][0]]}[options.answers]
    options.notes[f"{what} not used (--answers {options.answers})"] += len(counts) - len(taken)
    return taken


def ask_about(image: str | bytes, question: str, answer: str, record_id, **more) -> dict:
    """Return LLaVA's record of one image, a question and its answer."""
    text = put_images_first(question, 1) if question else DEFAULT_IMAGE_TOKEN
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": record_id, "image": image, "conversations": turns, **more}


def numbered(record_id, k: int, count: int):
    """Return an id for one of several records made of one."""
    return record_id if count == 1 else f"{record_id}-{k}"
