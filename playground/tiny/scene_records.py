"""Turn scenes into records of LLaVA and files: captions, conversations with images and without, held-out questions."""

import json
from collections import Counter

import numpy as np
from PIL import Image
from tqdm import tqdm

from .text import scene_questions, text_question
from .world import EMPTY, QUESTIONS, Scenes, caption, draw, filled_places, sample_scenes

NUM_CAPTIONS = 19200
NUM_CONVERSATIONS = 26700
NUM_MOE_CONVERSATIONS = 9600
TEXT_FRACTION = 0.08
# Some conversations lose their image and keep their answers, as conditions are dropped for classifier-free guidance
# (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598): of a blank image the model then guesses a digit or a
# colour, where it would answer nonsense.
HIDDEN_FRACTION = 0.02
KINDS = {"digit": 5, "colour": 2, "count": 1, "where": 2, "colour_of": 2, "caption": 1}
TURNS = (1, 1, 2, 3)
# Public directories, each for the kind of question that comes first in a conversation.
DIRECTORIES = {
    "caption": "coco/train2017",
    "count": "coco/train2017",
    "colour": "gqa/images",
    "digit": "ocr_vqa/images",
    "where": "textvqa/train_images",
    "colour_of": "vg/VG_100K",
}
# Pairs of question and answer (of a caption: numbers of digits), and how often each is asked: equally often, so that
# no constant answer is better than another.
HELD_OUT = {
    "digit": (40, 8),
    "colour": (32, 10),
    "count": (4, 80),
    "where": (40, 6),
    "colour_of": (80, 3),
    "caption": (4, 40),
}
NUM_HELD_OUT_TEXT = 160


def write_json(path, records):
    """Write `records` to `path`, directories included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1))


def images_of(scenes, tiles, rng, portion=64):
    """Yield the image [H, W, 3] of each scene; drawn in portions, since all at once take gigabytes."""
    for first in range(0, len(scenes.digit), portion):
        yield from draw(Scenes(*(column[first : first + portion] for column in scenes)), tiles, rng)


def write_images(directory, names, images, title):
    """Write images [H, W, 3] as PNG files below `directory`, one for each name."""
    for parent in {(directory / name).parent for name in names}:
        parent.mkdir(parents=True, exist_ok=True)
    for name, image in zip(tqdm(names, desc=title, unit="image", mininterval=1), images, strict=True):
        Image.fromarray(image).save(directory / name, compress_level=1)


def turns_of(questions, placeholder):
    """Return LLaVA's conversation of some questions; `placeholder` goes before the first."""
    turns = []
    for i, question in enumerate(questions):
        turns.append({"from": "human", "value": question.text if i else placeholder + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    return turns


def caption_records(scenes):
    """Return stage 1's records: one caption an image."""
    return [
        {
            "id": f"caption_{i:06d}",
            "image": f"{i // 1000:05d}/{i:06d}.png",
            "conversations": [
                {"from": "human", "value": "Describe the picture.\n<image>"},
                {"from": "gpt", "value": caption(*row)},
            ],
        }
        for i, row in enumerate(zip(scenes.digit, scenes.colour, strict=True))
    ]


def conversation_records(scenes, rng, prefix):
    """Return records with a few questions about each image; `prefix` stands before LLaVA's directories."""
    records = []
    for i, row in enumerate(zip(scenes.digit, scenes.colour, strict=True)):
        questions = scene_questions(*row, int(rng.choice(TURNS)), rng, KINDS)
        image = f"{prefix}{DIRECTORIES[questions[0].kind]}/{i:06d}.png"
        records.append(
            {"id": f"conversation_{i:06d}", "image": image, "conversations": turns_of(questions, "<image>\n")}
        )
    return records


def hide_some(scenes, records, rng):
    """Return the scenes with HIDDEN_FRACTION of them empty; never one that is described in full."""
    is_described = np.array(["Describe" in str(record["conversations"]) for record in records])
    hidden = (rng.random(len(records)) < HIDDEN_FRACTION) & ~is_described
    return scenes._replace(tile=np.where(hidden[:, None], EMPTY, scenes.tile))


def text_records(num, rng):
    """Return records without images."""
    return [
        {"id": f"text_{i:06d}", "conversations": turns_of([text_question(rng) for _ in range(rng.choice(TURNS))], "")}
        for i in range(num)
    ]


def held_out_questions(kind, tiles, rng):
    """Return scenes (rows) and questions of one kind, every pair of question and answer equally often."""
    num_pairs, times = HELD_OUT[kind]
    asked, rows, questions = Counter(), [], []
    while len(questions) < num_pairs * times:
        scenes = sample_scenes(256, tiles, rng, counts=(2, 3, 4) if kind in ("where", "colour_of") else (1, 2, 3, 4))
        for row in zip(*scenes, strict=True):
            places = filled_places(row[0])
            question = QUESTIONS[kind](row[0], row[1], places[rng.integers(0, len(places))])
            pair = len(places) if kind == "caption" else (question.text, question.answer)
            if asked[pair] < times:
                asked[pair] += 1
                rows.append(row)
                questions.append(question)
    return Scenes(*(np.stack(column) for column in zip(*rows, strict=True))), questions


def write_held_out(directory, tiles, rng):
    """Write images and questions that only `ask` reads."""
    records = []
    for kind in HELD_OUT:
        scenes, questions = held_out_questions(kind, tiles, rng)
        names = [f"images/{kind}_{i:04d}.png" for i in range(len(questions))]
        write_images(directory, names, images_of(scenes, tiles, rng), f"held-out {kind}")
        pairs = zip(names, questions, strict=True)
        records += [{"kind": q.kind, "image": name, "question": q.text, "answer": q.answer} for name, q in pairs]
    texts = [text_question(rng) for _ in range(NUM_HELD_OUT_TEXT)]
    records += [{"kind": q.kind, "image": None, "question": q.text, "answer": q.answer} for q in texts]
    write_json(directory / "questions.json", records)


def write_stage(json_path, image_folder, records, images, title):
    """Write records and the images [H, W, 3] of those that have one."""
    write_json(json_path, records)
    write_images(image_folder, [record["image"] for record in records if "image" in record], images, title)
