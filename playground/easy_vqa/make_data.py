"""Turn the training split of easy-VQA into records of LLaVA: captions for stage 1, conversations for stage 2.

python -m playground.easy_vqa.make_data --out easy_vqa/data

Below --out stand captions.json, conversations.json and images/. A caption says what the questions and answers of its
image say. Of each image there are copies whose shape is elsewhere: 4,000 images alone are soon known by heart.
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
# Of the images of a shape, the original and its copies, so many get a conversation; all get a caption.
NUM_ASKED = 2


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


def get_facts(questions):
    """Return the facts that questions and answers of one image name, or leave as the only choice."""
    true, false = set(), set()
    for question, answer in questions:
        words = set(re.findall(r"\w+", question))
        named = words & (SHAPES | COLOURS)
        if answer in YES_NO:
            is_there = (answer == "yes") != bool(words & NEGATIONS)
            (true if is_there else false).update(named)
        else:
            true |= named | {answer}
    return Facts(*(get_only(names & true) or get_only(names - false) for names in (COLOURS, SHAPES)))


def get_only(names):
    """Return the one name of a set, or None."""
    return next(iter(names)) if len(names) == 1 else None


def caption(facts):
    """Return the caption of an image, or None if its questions leave colour or shape open."""
    return None if None in facts else f"a {facts.colour} {facts.shape}"


def caption_record(name, text):
    """Return a record of stage 1."""
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text}]
    return {"id": f"caption_{name}", "image": f"{name}.png", "conversations": turns}


def conversation_record(name, questions):
    """Return a record of stage 2: all questions, the first with the image and the prompt of the benchmark."""
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
    captions, conversations = [], []
    for number, questions in tqdm(
        read_questions(data / "train").items(), desc="easy-VQA", unit="image", mininterval=1
    ):
        with Image.open(data / f"train/images/{number}.png") as file:
            image = np.asarray(file.convert("RGB"))
        text = caption(get_facts(questions))
        for copy in range(1 + num_copies):
            name = f"{number}_{copy}"
            Image.fromarray(move_shape(image, rng) if copy else image).save(
                out / f"images/{name}.png", compress_level=1
            )
            if copy < NUM_ASKED:
                shuffled = [questions[i] for i in rng.permutation(len(questions))]
                conversations.append(conversation_record(name, shuffled))
            if text is not None:
                captions.append(caption_record(name, text))
    for name, records in (("captions", captions), ("conversations", conversations)):
        (out / f"{name}.json").write_text(json.dumps(records, indent=1))


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
