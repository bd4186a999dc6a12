"""Turn the tower of playground/tiny into one for easy-VQA: contrastive training goes on, on images and captions.

python -m playground.easy_vqa.tower --data easy_vqa/data --out easy_vqa/tower

The tower was made for digits. Stage 1 alone could train it as it goes, but after 560 steps of 64 captions the model
still named a wrong shape for a quarter of the test images.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel

from playground.tiny.make_base import vision_model_of
from playground.tiny.tower import fit, make_clip

TINY = Path(__file__).parents[1] / "tiny"
NUM_STEPS = 900
BATCH = 64


def train_tower(data, num_steps=NUM_STEPS, seed=0, learning_rate=2e-3):
    """Return the tower after `num_steps` batches of the captions below `data`, and its image processor."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    records = json.loads((data / "captions.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(TINY / "llm")
    processor = CLIPImageProcessor.from_pretrained(TINY / "tower")
    tower = CLIPVisionModel.from_pretrained(TINY / "tower")

    def draw_batch():
        chosen = [records[i] for i in rng.integers(0, len(records), BATCH)]
        images = [Image.open(data / "images" / record["image"]) for record in chosen]
        captions = [record["conversations"][1]["value"] for record in chosen]
        return processor(images, return_tensors="pt").pixel_values, captions

    clip = make_clip(tokenizer, tower.config.to_dict())
    clip.vision_model.load_state_dict(
        {name.removeprefix("vision_model."): value for name, value in tower.state_dict().items()}
    )
    return vision_model_of(fit(clip, tokenizer, draw_batch, num_steps, learning_rate)), processor


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="directory that make_data has written")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for part in train_tower(args.data, args.steps, args.seed):
        part.save_pretrained(args.out)


if __name__ == "__main__":
    main()
