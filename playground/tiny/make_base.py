"""Make the base models of the tiny world: a tokenizer and a language model from text, a vision tower from pictures.

python -m playground.tiny.make_base --out playground/tiny

Base models are downloaded elsewhere; here they are made once and committed, as transformers saves them: `tower`, a
CLIPVisionModel with its image processor, and `llm`, a LlamaForCausalLM with its tokenizer. The tower has seen no
held-out scan, the language model no picture.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionModel

from llava_lite.conversation import get_template

from .llm import notes_accuracy, train_llm
from .text import make_tokenizer
from .tower import probe_accuracy, train_tower
from .world import HELD_OUT_FOLD, draw_tiles, training_folds

TOWER_STEPS = 5000
LLM_STEPS = 1500
VARIANTS = 16


def world_tokenizer():
    """Return the tokenizer of the world, which reads the template of stages 2 and 3 well."""
    return make_tokenizer([get_template("v1").with_turns([("human", "question"), ("gpt", "answer")]).render().text])


def vision_model_of(clip):
    """Return the picture side of a CLIPModel as the CLIPVisionModel that a checkpoint holds."""
    tower = CLIPVisionModel(clip.config.vision_config)
    weights = clip.vision_model.state_dict()
    # The names differ by a prefix in some releases of transformers.
    prefix = "" if set(weights) == set(tower.state_dict()) else "vision_model."
    tower.load_state_dict({prefix + name: value for name, value in weights.items()})
    return tower.eval()


def make_tower(folder, num_steps, held_out_fold, seed):
    """Write a CLIPVisionModel and its image processor; return its digit probe on held-out scans, 0 to 1."""
    rng = np.random.default_rng(seed)
    tiles = draw_tiles(training_folds(held_out_fold), VARIANTS, rng)
    clip, processor = train_tower(world_tokenizer(), tiles, num_steps, seed)
    tower = vision_model_of(clip)
    tower.save_pretrained(folder)
    processor.save_pretrained(folder)
    return probe_accuracy(tower, processor, tiles, draw_tiles([held_out_fold], 8, rng), seed)


def make_llm(folder, num_steps, seed):
    """Write a LlamaForCausalLM and its tokenizer; return {kind: accuracy} on written notes."""
    tokenizer = world_tokenizer()
    model = train_llm(tokenizer, num_steps, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return notes_accuracy(model, tokenizer, seed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where the folders tower and llm go")
    parser.add_argument("--only", choices=("tower", "llm"), help="make one of the two")
    parser.add_argument("--tower_steps", type=int, default=TOWER_STEPS)
    parser.add_argument("--llm_steps", type=int, default=LLM_STEPS)
    parser.add_argument("--held_out_fold", type=int, default=HELD_OUT_FOLD, help="scans i %% 5 to leave out, 0 to 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="one thread for each model is fastest at this size")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.process_time()
    if args.only != "llm":
        probe = make_tower(args.out / "tower", args.tower_steps, args.held_out_fold, args.seed)
        print(f"tower: {probe:.1%} of held-out digits read from its patches, {time.process_time() - start:.0f} CPU s")
    start = time.process_time()
    if args.only != "tower":
        shares = make_llm(args.out / "llm", args.llm_steps, args.seed)
        listed = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
        print(f"llm: right about written notes: {listed}, {time.process_time() - start:.0f} CPU s")


if __name__ == "__main__":
    main()
