"""Turn real handwriting into a tiny world on disk: images and conversations in LLaVA's JSON and directories.

python -m playground.tiny.make_world --out quickstart/data

Below --out stand LLaVA-Pretrain (stage 1) and LLaVA-Finetune (stage 2) as LLaVA-1.5 lays them out, MoE-LLaVA (stage 3)
as MoE-LLaVA does, and held_out/questions.json, whose images are drawn from scans that no stage or base model saw. So
are those of eval, the files of three benchmarks: see eval_data.py.
--system writes the files of another system in place of the first three: see other_worlds.py.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .systems import LLAVA, SYSTEMS
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
NUM_CONVERSATIONS = 26700
NUM_MOE_CONVERSATIONS = 9600
TEXT_FRACTION = 0.08
# Some conversations lose their image and keep their answers, as conditions are dropped for classifier-free guidance
# (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598): of a blank image the model then guesses a digit or a
# colour, where it would conversation nonsense.
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


def make_world(out, held_out_fold=HELD_OUT_FOLD, seed=0, scale=1.0):
    """Write the complete world of LLaVA below `out`. scale: fraction of the full number of training records."""
    from .eval_data import write_eval_data

    out = Path(out)
    rng = np.random.default_rng(seed)
    tiles = draw_tiles(training_folds(held_out_fold), 8, rng)
    sizes = [max(1, round(scale * num)) for num in (NUM_CAPTIONS, NUM_CONVERSATIONS, NUM_MOE_CONVERSATIONS)]
    captions, conversations, moe_conversations = (sample_scenes(num, tiles, rng) for num in sizes)

    pretrain = out / "LLaVA-Pretrain"
    records = caption_records(captions)
    images = images_of(captions, tiles, rng)
    write_stage(pretrain / "blip_laion_cc_sbu_558k.json", pretrain / "images", records, images, "captions")

    finetune = out / "LLaVA-Finetune"
    records = conversation_records(conversations, rng, "")
    images = images_of(hide_some(conversations, records, rng), tiles, rng)
    records += text_records(round(TEXT_FRACTION * sizes[1]), rng)
    write_stage(finetune / "llava_v1_5_mix665k.json", finetune / "data", records, images, "conversations")

    moe = out / "MoE-LLaVA"
    records = conversation_records(moe_conversations, rng, "llava_image_tune/")
    images = images_of(hide_some(moe_conversations, records, rng), tiles, rng)
    write_stage(moe / "ft_json/llava_image_tune_.json", moe, records, images, "conversations for experts")
    write_json(moe / "ft_json/nlp_tune.json", text_records(round(TEXT_FRACTION * sizes[2]), rng))

    held_out = draw_tiles([held_out_fold], 4, rng)
    write_held_out(out / "held_out", held_out, rng)
    write_eval_data(out / "eval", held_out, rng)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write: the DATA_ROOT of the stages")
    parser.add_argument("--system", choices=SYSTEMS, default=LLAVA, help="whose files to write")
    parser.add_argument("--held_out_fold", type=int, default=HELD_OUT_FOLD, help="scans i %% 5 to ask about, 0 to 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the training records, 0 to 1")
    args = parser.parse_args()
    if args.system == LLAVA:
        make_world(args.out, args.held_out_fold, args.seed, args.scale)
    else:
        from .other_worlds import make_other_world

        make_other_world(args.system, args.out, args.held_out_fold, args.seed, args.scale)


if __name__ == "__main__":
    main()
