"""Turn the training split of easy-VQA into records of LLaVA: captions, lists of names, questions, conversations.

python -m playground.easy_vqa.make_data --out easy_vqa/data

Below --out stand captions.json, names.json, questions.json, conversations.json and images/. What is said about an
image follows from its own questions and answers. Of each image there are copies whose shape is elsewhere: 4,000 images
alone are soon known by heart.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from llava_lite.eval.benchmarks.easy_vqa import SHAPES, YES_NO, installed
from llava_lite.eval.questions import SHORT_ANSWER

COLOURS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
NEGATIONS = {"no", "not"}
NUM_COPIES = 3
# A list names so many colours and shapes that are not in the image, and each of the two that are with this chance.
NUM_ABSENT = {"colour": 4, "shape": 2}
PRESENT_RATIO = 0.7
# Fewer negations than others: at equal shares "yes" and "no" follow each name equally often, and a model that does not
# compare yet gets no hint to.
NEGATED_RATIO = 0.4


class Facts(NamedTuple):
    """What the questions of an image say about its one shape; None where they do not say it."""

    colour: str | None
    shape: str | None


def read_questions(directory):
    """Return {number of an image: [(question, answer)]} of a split, in the order of its file."""
    found = defaultdict(list)
    for question, answer, image in json.loads((directory / "questions.json").read_text()):
        found[image].append((question, answer))
    return dict(found)


def names_in(question):
    """Return the colours and shapes that a question names."""
    return set(re.findall(r"\w+", question)) & (SHAPES | COLOURS)


def is_negated(question):
    """Return whether a question asks for what is not there."""
    return not NEGATIONS.isdisjoint(re.findall(r"\w+", question))


def says_there(question, answer):
    """Return whether an answer of yes or no says that what the question names is in the image."""
    return (answer == "yes") != is_negated(question)


def get_facts(questions):
    """Return the facts that questions and answers of one image name, or leave as the only choice."""
    true, false = set(), set()
    for question, answer in questions:
        if answer in YES_NO:
            (true if says_there(question, answer) else false).update(names_in(question))
        else:
            true |= names_in(question) | {answer}
    return Facts(*(get_only(names & true) or get_only(names - false) for names in (COLOURS, SHAPES)))


def get_only(names):
    """Return the one name of a set, or None."""
    return next(iter(names)) if len(names) == 1 else None


def caption(facts):
    """Return the caption of an image, or None if its questions leave colour or shape open."""
    return None if None in facts else f"a {facts.colour} {facts.shape}"


def shuffled(items, rng):
    """Return the items in a random order."""
    return [items[i] for i in rng.permutation(len(items))]


def draw_names(facts, rng):
    """Return names in a random order: what the image shows or not, and some that it does not show."""
    names = []
    for own, known, num in zip(facts, (COLOURS, SHAPES), NUM_ABSENT.values(), strict=True):
        names += [own] if rng.random() < PRESENT_RATIO else []
        names += shuffled(sorted(known - {own}), rng)[:num]
    return shuffled(names, rng)


def name_list(facts, rng):
    """Return "teal no circle yes red yes": names and whether the image shows them."""
    return " ".join(f"{name} {'yes' if name in facts else 'no'}" for name in draw_names(facts, rng))


def get_wordings(asked):
    """Return {(name, is negated): all questions of yes or no that name it} of {image: its questions}."""
    found = defaultdict(set)
    for question in {text for questions in asked.values() for text, answer in questions if answer in YES_NO}:
        for name in names_in(question):
            found[name, is_negated(question)].add(question)
    return {key: sorted(questions) for key, questions in found.items()}


def draw_questions(facts, wordings, rng):
    """Return questions of yes or no about drawn names, each as the split words it for some image, and the answers."""
    pairs = []
    for name in draw_names(facts, rng):
        negated = bool(rng.random() < NEGATED_RATIO)
        known = wordings.get((name, negated), ())
        if known:
            answer = "yes" if (name in facts) != negated else "no"
            pairs.append((known[rng.integers(len(known))], answer))
    return pairs


def balance(questions, rng):
    """Return all questions but some of yes or no: as many are left about what is absent as about what is there."""
    yes_no = [pair for pair in questions if pair[1] in YES_NO]
    there = [pair for pair in yes_no if says_there(*pair)]
    absent = [pair for pair in yes_no if not says_there(*pair)]
    others = [pair for pair in questions if pair[1] not in YES_NO]
    return shuffled(there + shuffled(absent, rng)[: max(1, len(there))] + others, rng)


def plain_record(kind, name, text):
    """Return a record of an image and a text."""
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text}]
    return {"id": f"{kind}_{name}", "image": f"{name}.png", "conversations": turns}


def conversation_record(name, questions):
    """Return a record of questions, the first with the image and the prompt of the benchmark."""
    turns = []
    for question, answer in questions:
        text = question if turns else f"<image>\n{question}{SHORT_ANSWER}"
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": f"conversation_{name}", "image": f"{name}.png", "conversations": turns}


def get_background(image):
    """Return the colour of most corners [3]: the one shape covers one of them at most."""
    corners, counts = np.unique(image[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0, return_counts=True)
    return corners[counts.argmax()]


def move_shape(image, rng):
    """Return the image [H, W, 3] with its shape anywhere it fits, in half of the calls mirrored left to right."""
    background = get_background(image)
    is_shape = (image != background).any(axis=2)
    top, *_, bottom = np.flatnonzero(is_shape.any(axis=1))
    left, *_, right = np.flatnonzero(is_shape.any(axis=0))
    shape = image[top : bottom + 1, left : right + 1]
    height, width, _ = shape.shape
    y, x = rng.integers(0, np.array(image.shape[:2]) - (height, width) + 1)
    moved = np.broadcast_to(background, image.shape).copy()
    moved[y : y + height, x : x + width] = shape
    return moved[:, ::-1] if rng.random() < 0.5 else moved


def make_data(out, data, num_copies=NUM_COPIES, seed=0):
    """Write records and images below `out`, from the `train` directory below `data`."""
    rng = np.random.default_rng(seed)
    (out / "images").mkdir(parents=True, exist_ok=True)
    asked = read_questions(data / "train")
    wordings = get_wordings(asked)
    records = {"captions": [], "names": [], "questions": [], "conversations": []}
    for number, questions in tqdm(asked.items(), desc="easy-VQA", unit="image", mininterval=1):
        with Image.open(data / f"train/images/{number}.png") as file:
            image = np.asarray(file.convert("RGB"))
        facts = get_facts(questions)
        for copy in range(1 + num_copies):
            name = f"{number}_{copy}"
            Image.fromarray(move_shape(image, rng) if copy else image).save(
                out / f"images/{name}.png", compress_level=1
            )
            for file, record in records_of(name, questions, facts, wordings, rng):
                records[file].append(record)
    for name, found in records.items():
        (out / f"{name}.json").write_text(json.dumps(found, indent=1))


def records_of(name, questions, facts, wordings, rng):
    """Yield (file, record) of an image."""
    if None not in facts:
        yield "captions", plain_record("caption", name, caption(facts))
        yield "names", plain_record("names", name, name_list(facts, rng))
        drawn = draw_questions(facts, wordings, rng)
        if drawn:
            yield "questions", plain_record("drawn", name, as_text(drawn))
    yield "questions", plain_record("asked", name, as_text(balance(questions, rng)))
    yield "conversations", conversation_record(name, balance(questions, rng))


def as_text(pairs):
    """Return questions and answers as one text."""
    return " ".join(f"{question} {answer}" for question, answer in pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--data", type=Path, help="directory of train/ and test/ (default: the package easy-vqa's)")
    parser.add_argument("--num_copies", type=int, default=NUM_COPIES, help="copies of an image with the shape moved")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = args.data or next(iter(installed()), None)
    if data is None:
        parser.error("the package easy-vqa is not installed: pip install easy-vqa, or name its data with --data.")
    make_data(args.out, data, args.num_copies, args.seed)


if __name__ == "__main__":
    main()
