"""Turn the checkpoint of a stage into its answers to the held-out questions, with the image and with a blank one.

python -m playground.tiny.ask --model quickstart/stage3 --questions quickstart/data/held_out --out answers.json
"""

import argparse
import json
import time
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from llava_lite.inference import load, reply

from .systems import LLAVA, SYSTEMS
from .world import CANVAS, DIRECT, SEARCH

BATCH = 80
# Answers of one word need three tokens; a caption of four digits 17.
NUM_TOKENS = {"caption": 32}
NUM_TOKENS_OF_A_WORD = 6
# Stage 1 is trained to caption without a question; all stages are asked as people will ask the last one.
TEMPLATE = SYSTEMS[LLAVA].template
FILES = ("image", "sound")


def read_questions(directory):
    """Return the records of questions.json, each with the full path of its image or sound (None for text alone)."""
    directory = Path(directory)
    records = json.loads((directory / "questions.json").read_text())
    return [
        record | {key: record[key] and str(directory / record[key]) for key in FILES if key in record}
        for record in records
    ]


def batches(records, size=BATCH):
    """Return the records in batches of one kind each."""
    kinds = dict.fromkeys(record["kind"] for record in records)
    by_kind = [[record for record in records if record["kind"] == kind] for kind in kinds]
    return [rows[i : i + size] for rows in by_kind for i in range(0, len(rows), size)]


def answers(model, processor, records, images, template=TEMPLATE):
    """Return the answers to records of one kind; images: one for each, None for text alone."""
    num_tokens = NUM_TOKENS.get(records[0]["kind"], NUM_TOKENS_OF_A_WORD)
    questions = [record["question"] for record in records]
    options = {"conv_template": template, "max_new_tokens": num_tokens}
    answered = reply(model, processor, questions, images=images, **options)
    return [text.strip() for text in answered]


def sound_answers(model, processor, records, template):
    """Return the answers to records about a sound, which stands where an image stood in training."""
    options = {"conv_template": template, "max_new_tokens": NUM_TOKENS_OF_A_WORD}
    media = ({"audio": record["sound"]} for record in records)
    pairs = zip(records, media, strict=True)
    return [reply(model, processor, record["question"], media=one, **options).strip() for record, one in pairs]


def blind_answers(model, processor, records, blank, template=TEMPLATE):
    """Return the answers to records of one kind with a blank image; equal questions are asked once."""
    once = list({record["question"]: record for record in records}.values())
    answered = answers(model, processor, once, [blank] * len(once), template)
    by_question = dict(zip((record["question"] for record in once), answered, strict=True))
    return [by_question[record["question"]] for record in records]


def ask(model, processor, records, title="asking", template=TEMPLATE):
    """Return the records with answers: "with_image" (or text, or sound) and, for questions of one word, "blank"."""
    asked = []
    bar = tqdm(total=len(records), desc=title, unit="question", mininterval=1)
    blank = Image.new("RGB", (CANVAS, CANVAS))
    for batch in batches(records):
        if batch[0].get("sound"):
            seen = sound_answers(model, processor, batch, template)
        else:
            seen = answers(model, processor, batch, [record["image"] for record in batch], template)
        is_blind_too = batch[0]["kind"] in {**DIRECT, **SEARCH}
        unseen = blind_answers(model, processor, batch, blank, template) if is_blind_too else [None] * len(batch)
        triples = zip(batch, seen, unseen, strict=True)
        asked += [{**record, "with_image": with_it, "blank": without} for record, with_it, without in triples]
        bar.update(len(batch))
    bar.close()
    return asked


def accuracy(asked, field="with_image"):
    """Return {kind: fraction right, 0 to 1} of asked records, for the answers under `field`."""
    hits = {}
    for record in asked:
        if record[field] is not None:
            hits.setdefault(record["kind"], []).append(record[field] == record["answer"])
    return {kind: sum(rows) / len(rows) for kind, rows in hits.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="directory of a finished stage")
    parser.add_argument("--questions", required=True, help="held_out directory of make_world")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--system", choices=SYSTEMS, default=LLAVA, help="whose template the questions are asked in")
    args = parser.parse_args()
    start = time.perf_counter()
    model, processor = load(args.model, device="cpu", dtype=torch.float32)
    title, template = f"asking {Path(args.model).name}", SYSTEMS[args.system].template
    asked = ask(model, processor, read_questions(args.questions), title, template)
    args.out.write_text(json.dumps({"seconds": time.perf_counter() - start, "records": asked}, indent=1))
    fractions = {field: accuracy(asked, field) for field in ("with_image", "blank")}
    for kind, fraction in fractions["with_image"].items():
        blank = f"{fractions['blank'][kind]:7.1%}" if kind in fractions["blank"] else "      -"
        print(f"{kind:>10}  image {fraction:6.1%}  blank {blank}")


if __name__ == "__main__":
    main()
