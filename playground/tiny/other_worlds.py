"""Write the tiny world as other systems read it: the caption files and META mixtures of LLaMA-Adapter and Accessory.

Below --out stand captions.csv (`url` and `caption`, tab-separated) with captions.yaml, conversations.json with
instructions.yaml, which names the single-turn records that `llava-lite single-turn` makes of it, and held_out.
ImageBind-LLM's images hold one digit, since one vector is all that it gets of an image; held out are sounds too.
"""

from collections import Counter
from pathlib import Path

import numpy as np

from .scene_records import (
    NUM_CAPTIONS,
    NUM_CONVERSATIONS,
    TEXT_FRACTION,
    conversation_records,
    hide_some,
    images_of,
    text_records,
    turns_of,
    write_held_out,
    write_images,
    write_json,
)
from .sound import draw_sound, wav_bytes
from .text import one_caption, one_digit_questions, text_question
from .world import (
    EMPTY,
    HELD_OUT_FOLD,
    Scenes,
    caption,
    draw_tiles,
    sample_scenes,
    training_folds,
)

CAPTIONS = "META:\n  - captions.csv\n"
INSTRUCTIONS = "META:\n  - {path: single_turn.json, type: image_text, preprocess: single_turn_llava}\n"
# Answers of a kind of question about one digit, and how often each is asked for.
ONE_DIGIT_HELD_OUT = {"digit": (10, 20), "colour": (8, 25), "caption": (80, 1)}
NUM_SOUNDS = 120
NUM_TEXTS = 40


def write_captions(out, scenes, tiles, rng, describe):
    """Write captions.csv, captions.yaml and the images; describe: digits and colours of a scene to its caption."""
    names = [f"captions/{i // 1000:05d}/{i:06d}.png" for i in range(len(scenes.digit))]
    rows = zip(names, scenes.digit, scenes.colour, strict=True)
    lines = ["url\tcaption", *(f"{name}\t{describe(digit, colour)}" for name, digit, colour in rows)]
    (out / "captions.csv").write_text("\n".join(lines) + "\n")
    (out / "captions.yaml").write_text(CAPTIONS)
    write_images(out, names, images_of(scenes, tiles, rng), "captions")


def write_instructions(out, scenes, records, tiles, rng):
    """Write conversations.json, those without an image too, instructions.yaml and the images."""
    images = images_of(hide_some(scenes, records, rng), tiles, rng)
    write_images(out, [record["image"] for record in records], images, "conversations")
    write_json(out / "conversations.json", records + text_records(round(TEXT_FRACTION * len(records)), rng))
    (out / "instructions.yaml").write_text(INSTRUCTIONS)


def write_full_world(out, sizes, fold, tiles, rng):
    """Write images of up to four digits, as LLaVA's stages have them."""
    captions, conversations = (sample_scenes(num, tiles, rng) for num in sizes)
    write_captions(out, captions, tiles, rng, caption)
    records = conversation_records(conversations, rng, "conversations/")
    write_instructions(out, conversations, records, tiles, rng)
    write_held_out(out / "held_out", draw_tiles([fold], 4, rng), rng)


def write_one_digit_world(out, sizes, fold, tiles, rng):
    """Write images of one digit, and held-out sounds."""
    captions, conversations = (sample_scenes(num, tiles, rng, counts=(1,)) for num in sizes)
    write_captions(out, captions, tiles, rng, one_caption)
    records = []
    for i, row in enumerate(zip(conversations.digit, conversations.colour, strict=True)):
        questions = one_digit_questions(*row)
        # A description is rare: hide_some leaves its image as it is.
        chosen = rng.permutation(2) if rng.random() < 0.9 else [2]
        image = f"conversations/{i // 1000:05d}/{i:06d}.png"
        turns = turns_of([questions[j] for j in chosen], "<image>\n")
        records.append({"id": f"conversation_{i:06d}", "image": image, "conversations": turns})
    write_instructions(out, conversations, records, tiles, rng)
    write_one_digit_held_out(out / "held_out", draw_tiles([fold], 4, rng), rng)


def balanced_questions(index, total, times, tiles, rng):
    """Return scenes of one digit and question `index` about each, every answer `times` times, `total` in all."""
    asked, rows, questions = Counter(), [], []
    while len(questions) < total:
        for row in zip(*sample_scenes(256, tiles, rng, counts=(1,)), strict=True):
            question = one_digit_questions(*row[:2])[index]
            if asked[question.answer] < times:
                asked[question.answer] += 1
                rows.append(row)
                questions.append(question)
    return Scenes(*(np.stack(column) for column in zip(*rows, strict=True))), questions


def write_one_digit_held_out(directory, tiles, rng):
    """Write images, sounds and questions, every pair of question and answer equally often."""
    records = []
    for index, (kind, (num_answers, times)) in enumerate(ONE_DIGIT_HELD_OUT.items()):
        scenes, questions = balanced_questions(index, num_answers * times, times, tiles, rng)
        names = [f"images/{kind}_{i:04d}.png" for i in range(len(questions))]
        write_images(directory, names, images_of(scenes, tiles, rng), f"held-out {kind}")
        records += [to_record(question, name) for question, name in zip(questions, names, strict=True)]
    records += [to_record(text_question(rng)) for _ in range(NUM_TEXTS)]
    write_json(directory / "questions.json", records + write_sounds(directory, rng))


def to_record(question, image=None):
    """Return what questions.json says about a question."""
    return {"kind": question.kind, "image": image, "question": question.text, "answer": question.answer}


def write_sounds(directory, rng):
    """Write sounds of all digits; return the records that ask for them."""
    (directory / "sounds").mkdir(parents=True, exist_ok=True)
    records, (question, *_) = [], one_digit_questions(np.full(4, EMPTY), np.zeros(4, int))
    for i in range(NUM_SOUNDS):
        name, digit = f"sounds/{i:04d}.wav", i % 10
        (directory / name).write_bytes(wav_bytes(draw_sound(digit, rng)))
        records.append({**to_record(question._replace(kind="sound", answer=str(digit))), "sound": name})
    return records


WORLDS = {"adapter": write_full_world, "accessory": write_full_world, "imagebind": write_one_digit_world}


def make_other_world(system, out, held_out_fold=HELD_OUT_FOLD, seed=0, scale=1.0):
    """Write the complete world of a system below `out`. scale: fraction of the full number of training records."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tiles = draw_tiles(training_folds(held_out_fold), 8, rng)
    sizes = [max(1, round(scale * num)) for num in (NUM_CAPTIONS, NUM_CONVERSATIONS)]
    WORLDS[system](out, sizes, held_out_fold, tiles, rng)
