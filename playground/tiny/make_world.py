"""Turn real handwriting into a tiny world on disk: pictures and talks in LLaVA's JSON and folders.

python -m playground.tiny.make_world --out quickstart/data

Below --out stand LLaVA-Pretrain (stage 1) and LLaVA-Finetune (stage 2) as LLaVA-1.5 lays them out, MoE-LLaVA (stage 3)
as MoE-LLaVA does, and held_out/questions.json, whose pictures are drawn from scans that no stage or base model saw.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .text import scene_questions, text_question
from .world import (
    EMPTY,
    HELD_OUT_FOLD,
    QUESTIONS,
    Scenes,
    caption,
    draw,
    draw_tiles,
    filled_places,
    sample_scenes,
    training_folds,
)

NUM_CAPTIONS = 19200
NUM_TALKS = 26700
NUM_MOE_TALKS = 9600
TEXT_SHARE = 0.08
# Some talks lose their picture and keep their answers, as conditions are dropped for classifier-free guidance (Ho and
# Salimans 2022, https://arxiv.org/abs/2207.12598): of a blank picture the model then guesses a digit or a colour,
# where it would talk nonsense.
HIDDEN_SHARE = 0.02
KINDS = {"digit": 5, "colour": 2, "count": 1, "where": 2, "colour_of": 2, "caption": 1}
TURNS = (1, 1, 2, 3)
# Public folders, each for the kind of question that comes first in a talk.
FOLDERS = {
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
    """Write `records` to `path`, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1))


def pictures_of(scenes, tiles, rng, portion=64):
    """Yield the picture [H, W, 3] of each scene; drawn in portions, since all at once take gigabytes."""
    for first in range(0, len(scenes.digit), portion):
        yield from draw(Scenes(*(column[first : first + portion] for column in scenes)), tiles, rng)


def write_pictures(folder, names, pictures, title):
    """Write pictures [H, W, 3] as PNG files below `folder`, one for each name."""
    for parent in {(folder / name).parent for name in names}:
        parent.mkdir(parents=True, exist_ok=True)
    for name, picture in zip(tqdm(names, desc=title, unit="picture", mininterval=1), pictures, strict=True):
        Image.fromarray(picture).save(folder / name, compress_level=1)


def turns_of(questions, mark):
    """Return LLaVA's conversation of some questions; `mark` goes before the first."""
    turns = []
    for i, question in enumerate(questions):
        turns.append({"from": "human", "value": question.text if i else mark + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    return turns


def caption_records(scenes):
    """Return stage 1's records: one caption a picture."""
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


def talk_records(scenes, rng, prefix):
    """Return records with a few questions about each picture; `prefix` stands before LLaVA's folders."""
    records = []
    for i, row in enumerate(zip(scenes.digit, scenes.colour, strict=True)):
        questions = scene_questions(*row, int(rng.choice(TURNS)), rng, KINDS)
        image = f"{prefix}{FOLDERS[questions[0].kind]}/{i:06d}.png"
        records.append({"id": f"talk_{i:06d}", "image": image, "conversations": turns_of(questions, "<image>\n")})
    return records


def hide_some(scenes, records, rng):
    """Return the scenes with HIDDEN_SHARE of them empty; never one that is described in full."""
    is_described = np.array(["Describe" in str(record["conversations"]) for record in records])
    hidden = (rng.random(len(records)) < HIDDEN_SHARE) & ~is_described
    return scenes._replace(tile=np.where(hidden[:, None], EMPTY, scenes.tile))


def text_records(num, rng):
    """Return records without pictures."""
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


def write_held_out(folder, tiles, rng):
    """Write pictures and questions that only `ask` reads."""
    records = []
    for kind in HELD_OUT:
        scenes, questions = held_out_questions(kind, tiles, rng)
        names = [f"images/{kind}_{i:04d}.png" for i in range(len(questions))]
        write_pictures(folder, names, pictures_of(scenes, tiles, rng), f"held-out {kind}")
        pairs = zip(names, questions, strict=True)
        records += [{"kind": q.kind, "image": name, "question": q.text, "answer": q.answer} for name, q in pairs]
    texts = [text_question(rng) for _ in range(NUM_HELD_OUT_TEXT)]
    records += [{"kind": q.kind, "image": None, "question": q.text, "answer": q.answer} for q in texts]
    write_json(folder / "questions.json", records)


def write_stage(json_path, image_folder, records, pictures, title):
    """Write records and the pictures [H, W, 3] of those that have one."""
    write_json(json_path, records)
    write_pictures(image_folder, [record["image"] for record in records if "image" in record], pictures, title)


def make_world(out, held_out_fold=HELD_OUT_FOLD, seed=0, scale=1.0):
    """Write the whole world below `out`. scale: share of the full number of training records."""
    out = Path(out)
    rng = np.random.default_rng(seed)
    tiles = draw_tiles(training_folds(held_out_fold), 8, rng)
    sizes = [max(1, round(scale * num)) for num in (NUM_CAPTIONS, NUM_TALKS, NUM_MOE_TALKS)]
    captions, talks, moe_talks = (sample_scenes(num, tiles, rng) for num in sizes)

    pretrain = out / "LLaVA-Pretrain"
    records = caption_records(captions)
    pictures = pictures_of(captions, tiles, rng)
    write_stage(pretrain / "blip_laion_cc_sbu_558k.json", pretrain / "images", records, pictures, "captions")

    finetune = out / "LLaVA-Finetune"
    records = talk_records(talks, rng, "")
    pictures = pictures_of(hide_some(talks, records, rng), tiles, rng)
    records += text_records(round(TEXT_SHARE * sizes[1]), rng)
    write_stage(finetune / "llava_v1_5_mix665k.json", finetune / "data", records, pictures, "talks")

    moe = out / "MoE-LLaVA"
    records = talk_records(moe_talks, rng, "llava_image_tune/")
    pictures = pictures_of(hide_some(moe_talks, records, rng), tiles, rng)
    write_stage(moe / "ft_json/llava_image_tune_.json", moe, records, pictures, "talks for experts")
    write_json(moe / "ft_json/nlp_tune.json", text_records(round(TEXT_SHARE * sizes[2]), rng))

    write_held_out(out / "held_out", draw_tiles([held_out_fold], 4, rng), rng)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write: the DATA_ROOT of the stages")
    parser.add_argument("--held_out_fold", type=int, default=HELD_OUT_FOLD, help="scans i %% 5 to ask about, 0 to 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the training records, 0 to 1")
    args = parser.parse_args()
    make_world(args.out, args.held_out_fold, args.seed, args.scale)


if __name__ == "__main__":
    main()
