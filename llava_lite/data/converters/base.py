"""State what a conversion is told and what its readers yield."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from llava_lite.data.scan import DataError

ANSWER_CHOICES = ("all", "first", "majority")


class Found(NamedTuple):
    """An object that a reader found: as a record that parse_record reads, or the reason why it is none."""

    where: str  # "captions.json[17]"
    item: dict | None
    reason: str = ""


@dataclass
class Options:
    """What the command is told, and what its readers have to say: counts in `notes`, sentences in `said`.

    answers: which of several answers or captions are taken. image_key: the keys or columns of the images, in
    order. drop: keys or columns that are left out. image_name: a
    pattern for a name out of its value, `COCO_train2014_{:012d}.jpg`. image_prefix: put in front of paths.
    annotations: the file of answers of a VQA data set. dataset: a name in LLaMA-Factory's dataset_info. columns: of a
    table without a header. question: what is asked of an image that has a caption.
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
    said: list[str] = field(default_factory=list)


def pick_answers(answers: list[str], options: Options, name: str, what: str = "answers") -> list[str]:
    """Return the answers that are taken, equal ones once; DataError if there are several and nothing says which.

    majority: the most frequent one; of equally frequent ones the first.
    """
    counts = Counter(answers)
    if len(counts) < 2:
        return list(counts)
    if options.answers is None:
        raise DataError(
            f"{name} has {len(counts)} different {what}: {', '.join(map(repr, list(counts)[:3]))}... Say which to "
            "take: --answers all (a record each), first, or majority (the most frequent)."
        )
    taken = {"all": list(counts), "first": answers[:1], "majority": [counts.most_common(1)[0][0]]}[options.answers]
    options.notes[f"{what} not taken (--answers {options.answers})"] += len(counts) - len(taken)
    return taken


def ask_about(image: str | bytes, question: str, answer: str, record_id, **more) -> dict:
    """Return LLaVA's record of one image, a question and its answer."""
    text = f"<image>\n{question}" if question else "<image>"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": record_id, "image": image, "conversations": turns, **more}


def numbered(record_id, k: int, count: int):
    """Return an id for one of several records that come of one."""
    return record_id if count == 1 else f"{record_id}-{k}"
