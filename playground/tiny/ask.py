"""Turn the checkpoint of a stage into its answers to the held-out questions, with the picture and with a blank one.

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

from .world import CANVAS, DIRECT, SEARCH

BATCH = 80
# Answers of one word need three tokens; a caption of four digits 17.
NUM_TOKENS = {"caption": 32}
NUM_TOKENS_OF_A_WORD = 6
# Stage 1 is trained to caption without a question; all stages are asked as people will ask the last one.
TEMPLATE = "v1"


def read_questions(folder):
    """Return the records of questions.json, each with the whole path of its picture (None for text alone)."""
    folder = Path(folder)
    records = json.loads((folder / "questions.json").read_text())
    return [{**record, "image": record["image"] and str(folder / record["image"])} for record in records]


def batches(records, size=BATCH):
    """Return the records in batches of one kind each."""
    kinds = dict.fromkeys(record["kind"] for record in records)
    by_kind = [[record for record in records if record["kind"] == kind] for kind in kinds]
    return [rows[i : i + size] for rows in by_kind for i in range(0, len(rows), size)]


def answers(model, processor, records, pictures):
    """Return the answers to records of one kind; pictures: one for each, None for text alone."""
    num_tokens = NUM_TOKENS.get(records[0]["kind"], NUM_TOKENS_OF_A_WORD)
    questions = [record["question"] for record in records]
    said = reply(model, processor, questions, images=pictures, conv_template=TEMPLATE, max_new_tokens=num_tokens)
    return [text.strip() for text in said]


def blind_answers(model, processor, records, blank):
    """Return the answers to records of one kind with a blank picture; equal questions are asked once."""
    once = list({record["question"]: record for record in records}.values())
    said = answers(model, processor, once, [blank] * len(once))
    by_question = dict(zip((record["question"] for record in once), said, strict=True))
    return [by_question[record["question"]] for record in records]


def ask(model, processor, records, title="asking"):
    """Return the records with what was said: "picture" (or text alone) and, for questions of one word, "blank"."""
    asked = []
    bar = tqdm(total=len(records), desc=title, unit="question", mininterval=1)
    blank = Image.new("RGB", (CANVAS, CANVAS))
    for batch in batches(records):
        seen = answers(model, processor, batch, [record["image"] for record in batch])
        is_blind_too = batch[0]["kind"] in {**DIRECT, **SEARCH}
        unseen = blind_answers(model, processor, batch, blank) if is_blind_too else [None] * len(batch)
        triples = zip(batch, seen, unseen, strict=True)
        asked += [{**record, "picture": with_it, "blank": without} for record, with_it, without in triples]
        bar.update(len(batch))
    bar.close()
    return asked


def accuracy(asked, field="picture"):
    """Return {kind: share right, 0 to 1} of asked records, for what was said under `field`."""
    hits = {}
    for record in asked:
        if record[field] is not None:
            hits.setdefault(record["kind"], []).append(record[field] == record["answer"])
    return {kind: sum(rows) / len(rows) for kind, rows in hits.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a finished stage")
    parser.add_argument("--questions", required=True, help="held_out folder of make_world")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    start = time.perf_counter()
    model, processor = load(args.model, device="cpu", dtype=torch.float32)
    asked = ask(model, processor, read_questions(args.questions), title=f"asking {Path(args.model).name}")
    args.out.write_text(json.dumps({"seconds": time.perf_counter() - start, "records": asked}, indent=1))
    shares = {field: accuracy(asked, field) for field in ("picture", "blank")}
    for kind, share in shares["picture"].items():
        blank = f"{shares['blank'][kind]:7.1%}" if kind in shares["blank"] else "      -"
        print(f"{kind:>10}  picture {share:6.1%}  blank {blank}")


if __name__ == "__main__":
    main()
