"""Turn real handwriting into a tiny world on disk: images and conversations in LLaVA's JSON and directories.

python -m playground.tiny.make_world --out quickstart/data

Below --out stand LLaVA-Pretrain (stage 1) and LLaVA-Finetune (stage 2) as LLaVA-1.5 lays them out, MoE-LLaVA (stage 3)
as MoE-LLaVA does, and held_out/questions.json, whose images are drawn from scans that no stage or base model saw. So
are those of eval, the files of three benchmarks: see eval_data.py.
--system writes the files of another system in place of the first three: see other_worlds.py.
"""

import argparse
from pathlib import Path

import numpy as np

from .eval_data import write_eval_data
from .other_worlds import make_other_world
from .scene_records import (
    NUM_CAPTIONS,
    NUM_CONVERSATIONS,
    NUM_MOE_CONVERSATIONS,
    TEXT_FRACTION,
    caption_records,
    conversation_records,
    hide_some,
    images_of,
    text_records,
    write_held_out,
    write_json,
    write_stage,
)
from .systems import LLAVA, SYSTEMS
from .world import HELD_OUT_FOLD, draw_tiles, sample_scenes, training_folds


def make_world(out, held_out_fold=HELD_OUT_FOLD, seed=0, scale=1.0):
    """Write the complete world of LLaVA below `out`. scale: fraction of the full number of training records."""
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
        make_other_world(args.system, args.out, args.held_out_fold, args.seed, args.scale)


if __name__ == "__main__":
    main()
