"""Make the base models of the tiny world: a tokenizer and a language model from text, encoders from images and sounds.

python -m playground.tiny.make_base --out playground/tiny

Base models are downloaded elsewhere; here they are made once and committed, as transformers saves them: `tower`, a
CLIPVisionModel with its image processor, `llm`, a LlamaForCausalLM with its tokenizer, `alpaca_llm`, the same for
Alpaca's template, and `imagebind`, which reads images and sounds of one digit. The encoders have seen no held-out
scan, the language models no image.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM

from llava_lite.conversation import get_template

from .alpaca_llm import alpaca_accuracy, train_alpaca_llm
from .imagebind import nearest_digit, train_imagebind
from .llm import notes_accuracy, train_llm
from .text import make_tokenizer
from .tower import image_processor, probe_accuracy, train_tower
from .world import HELD_OUT_FOLD, draw_tiles, training_folds

TOWER_STEPS = 5000
LLM_STEPS = 1500
ALPACA_STEPS = 400
MODELS = ("tower", "llm", "alpaca_llm", "imagebind")
IMAGE_STEPS, SOUND_STEPS = 2000, 600
VARIANTS = 16


def world_tokenizer():
    """Return the tokenizer of the world, which reads the template of stages 2 and 3 well."""
    return make_tokenizer([get_template("v1").with_turns([("human", "question"), ("gpt", "answer")]).render().text])


def vision_model_of(clip):
    """Return the image side of a CLIPModel as the CLIPVisionModel that a checkpoint holds."""
    tower = CLIPVisionModel(clip.config.vision_config)
    weights = clip.vision_model.state_dict()
    # The names differ by a prefix in some releases of transformers.
    prefix = "" if set(weights) == set(tower.state_dict()) else "vision_model."
    tower.load_state_dict({prefix + name: value for name, value in weights.items()})
    return tower.eval()


def make_tower(directory, num_steps, held_out_fold, seed):
    """Write a CLIPVisionModel and its image processor; return its digit probe on held-out scans, 0 to 1."""
    rng = np.random.default_rng(seed)
    tiles = draw_tiles(training_folds(held_out_fold), VARIANTS, rng)
    clip, processor = train_tower(world_tokenizer(), tiles, num_steps, seed)
    tower = vision_model_of(clip)
    tower.save_pretrained(directory)
    processor.save_pretrained(directory)
    return probe_accuracy(tower, processor, tiles, draw_tiles([held_out_fold], 8, rng), seed)


def make_llm(directory, num_steps, seed):
    """Write a LlamaForCausalLM and its tokenizer; return {kind: accuracy} on written notes."""
    tokenizer = world_tokenizer()
    model = train_llm(tokenizer, num_steps, seed)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return notes_accuracy(model, tokenizer, seed)


def make_alpaca_llm(llm, directory, num_steps, seed):
    """Write the model of directory `llm` after training on Alpaca's template; return its accuracy on notes."""
    model, old_tokenizer = LlamaForCausalLM.from_pretrained(llm), AutoTokenizer.from_pretrained(llm)
    model, tokenizer = train_alpaca_llm(model, old_tokenizer, num_steps, seed)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return alpaca_accuracy(model, tokenizer, seed)


def make_imagebind(directory, num_steps, held_out_fold, seed):
    """Write an ImageBindModel and its image processor; return its accuracies on held-out images and new sounds."""
    rng = np.random.default_rng(seed)
    tiles = draw_tiles(training_folds(held_out_fold), VARIANTS, rng)
    model = train_imagebind(tiles, *num_steps, seed)
    model.save_pretrained(directory)
    image_processor().save_pretrained(directory)
    return nearest_digit(model, tiles, draw_tiles([held_out_fold], 8, rng), seed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where the directories go")
    parser.add_argument("--only", choices=MODELS, help="make one of them")
    parser.add_argument("--tower_steps", type=int, default=TOWER_STEPS)
    parser.add_argument("--llm_steps", type=int, default=LLM_STEPS)
    parser.add_argument("--alpaca_steps", type=int, default=ALPACA_STEPS)
    parser.add_argument("--image_steps", type=int, default=IMAGE_STEPS, help="of imagebind")
    parser.add_argument("--sound_steps", type=int, default=SOUND_STEPS, help="of imagebind")
    parser.add_argument("--held_out_fold", type=int, default=HELD_OUT_FOLD, help="scans i %% 5 to leave out, 0 to 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="one thread for each model is fastest at this size")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.process_time()
    if args.only in (None, "tower"):
        probe = make_tower(args.out / "tower", args.tower_steps, args.held_out_fold, args.seed)
        print(f"tower: {probe:.1%} of held-out digits read from its patches, {time.process_time() - start:.0f} CPU s")
    start = time.process_time()
    if args.only in (None, "llm"):
        fractions = make_llm(args.out / "llm", args.llm_steps, args.seed)
        listed = ", ".join(f"{kind} {fraction:.0%}" for kind, fraction in fractions.items())
        print(f"llm: right about written notes: {listed}, {time.process_time() - start:.0f} CPU s")
    start = time.process_time()
    if args.only in (None, "alpaca_llm"):
        right = make_alpaca_llm(args.out / "llm", args.out / "alpaca_llm", args.alpaca_steps, args.seed)
        print(f"alpaca_llm: {right:.0%} right about written notes, {time.process_time() - start:.0f} CPU s")
    start = time.process_time()
    if args.only in (None, "imagebind"):
        steps = args.image_steps, args.sound_steps
        image, sound = make_imagebind(args.out / "imagebind", steps, args.held_out_fold, args.seed)
        seconds = time.process_time() - start
        print(f"imagebind: digit of held-out images {image:.1%}, of sounds {sound:.1%}, {seconds:.0f} CPU s")


if __name__ == "__main__":
    main()
