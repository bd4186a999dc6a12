"""Turn scenes into the files of three benchmarks in their own formats: POPE, two tasks of MME, and TextVQA.

`write_eval_data` writes LLaVA's playground/data/eval of held-out digits, which `llava-lite eval` reads. The questions
of TextVQA are those that the tiny model was taught, without the ending that LLaVA gives to real ones. Those of POPE
and MME want yes or no, which it was not taught: see yes_no.py.
"""

import json

import numpy as np

from .scene_records import images_of, write_images, write_json
from .world import EMPTY, QUESTIONS, filled_places, sample_scenes
from .yes_no import YES_NO, existence_text, yes_no_question

NUM_POPE_IMAGES = 50
NUM_MME_IMAGES = 20
NUM_TEXTVQA_IMAGES = 160
NUM_ANSWERS = 10
MME_ENDING = "Please answer yes or no."


def write_lines(path, records):
    """Write a JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def draw_scenes(num, tiles, rng, directory, name):
    """Write `num` images with an empty place, `name`.format(i), and return [(file name, digit, colour)]."""
    scenes = sample_scenes(num, tiles, rng, counts=(1, 2, 3))
    names = [name.format(i) for i in range(num)]
    write_images(directory, names, images_of(scenes, tiles, rng), f"eval {directory.name}")
    return list(zip(names, scenes.digit, scenes.colour, strict=True))


def empty_places(images, rng):
    """Return {part of POPE: place without a digit}, one for each image, by POPE's three rules.

    random: any. popular: the one that is filled in most images. adversarial: the one that is most often filled
    together with those of the image.
    """
    present = np.array([digit != EMPTY for _, digit, _ in images]).astype(int)  # [images, 4]
    counts, together = present.sum(axis=0), present.T @ present
    chosen = {"random": [], "popular": [], "adversarial": []}
    for row in present:
        absent = np.flatnonzero(row == 0)
        chosen["random"].append(int(rng.choice(absent)))
        chosen["popular"].append(int(absent[counts[absent].argmax()]))
        chosen["adversarial"].append(int(absent[(row @ together)[absent].argmax()]))
    return chosen


def write_pope(directory, tiles, rng):
    """Write POPE: the labels of each part, and LLaVA's questions. Each image gets a yes and a no of each part."""
    name = "COCO_val2014_{:012d}.png"
    images = draw_scenes(NUM_POPE_IMAGES, tiles, rng, directory / "val2014", name)
    there = [int(rng.choice(filled_places(digit))) for _, digit, _ in images]
    asked = []
    for part, absent in empty_places(images, rng).items():
        labels = []
        for (image, _, _), one, other in zip(images, there, absent, strict=True):
            for place, label in ((one, "yes"), (other, "no")):
                line = {"question_id": len(labels) + 1, "image": image, "text": existence_text(place)}
                labels.append({**line, "label": label})
                asked.append({**line, "category": part})
        write_lines(directory / f"coco/coco_pope_{part}.json", labels)
    write_lines(directory / "llava_pope_test.jsonl", asked)


def write_mme(directory, tiles, rng):
    """Write MME's release with the tasks of YES_NO, a yes and a no about each image, and LLaVA's questions."""
    release, asked = directory / "MME_Benchmark_release_version", []
    for task in YES_NO:
        for image, digit, _ in draw_scenes(NUM_MME_IMAGES, tiles, rng, release / task, "{:04d}.png"):
            questions = [yes_no_question(task, digit, holds, rng) for holds in (True, False)]
            lines = [f"{one.text} {MME_ENDING}\t{one.answer.capitalize()}\n" for one in questions]
            (release / task / image).with_suffix(".txt").write_text("".join(lines))
            key = f"{task}/{image}"
            asked += [{"question_id": key, "image": key, "text": one.text, "category": task} for one in questions]
    write_lines(directory / "llava_mme.jsonl", asked)


def write_textvqa(directory, tiles, rng):
    """Write TextVQA: which digit stands at a place, with ten equal answers."""
    asked, data = [], []
    for image, *row in draw_scenes(NUM_TEXTVQA_IMAGES, tiles, rng, directory / "train_images", "{}.png"):
        question = QUESTIONS["digit"](*row, int(rng.choice(filled_places(row[0]))))
        key = image.removesuffix(".png")
        asked.append({"question_id": key, "image": image, "text": question.text, "category": "default"})
        answers = [question.answer] * NUM_ANSWERS
        data.append({"question_id": len(data), "image_id": key, "question": question.text, "answers": answers})
    write_lines(directory / "llava_textvqa_val_v051_ocr.jsonl", asked)
    write_json(directory / "TextVQA_0.5.1_val.json", {"data": data})


def write_eval_data(directory, tiles, rng):
    """Write all three below `directory`."""
    write_pope(directory / "pope", tiles, rng)
    write_mme(directory / "MME", tiles, rng)
    write_textvqa(directory / "textvqa", tiles, rng)
