"""Train every stage with two checkouts by turns and compare their tokens per second.

    git worktree add ../before COMMIT
    python -m benchmarks.same_speed --before ../before [--quick] [--stages 1 2 3] [--gate 0.8] [--json FILE]

For a change that must not make training slower. Both run `python -m llava_lite.train.train`, a command of every
commit, with the same flags on a generated base model of size S, generated images and records. Each run has its own
process, alone on the machine; a round runs both checkouts, this one twice, in random order. The first steps of a
process warm it up. A ratio is the speed of this checkout over that of `--before`. Exits with 1 if one is below the
gate.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from benchmarks.alone import get_samples, run_rounds
from benchmarks.same_numbers import EXPERTS, ROOT, read_log, run
from benchmarks.timing import arguments, summary, write_result
from benchmarks.workload import Size, fill, size_of

BEFORE, AFTER = "before", "after"
# Steps of a process: those that warm it up, and those that are timed.
STEPS, QUICK_STEPS = (2, 4), (1, 1)
NUM_IMAGES = 8
# One token each in the tokenizer of playground/tiny.
WORDS = [
    "red",
    "blue",
    "green",
    "yellow",
    "orange",
    "white",
    "cyan",
    "purple",
    "digit",
    "question",
    "answer",
    "before",
]
TINY = ROOT / "playground" / "tiny"
COMMON = (
    "--logging_steps 1 --save_strategy no --bf16 False --use_cpu True --seed 0 --model_max_length 2048 "
    "--gradient_checkpointing False --report_to none --disable_tqdm True --learning_rate 1e-5"
)


def make_base(size: Size, directory: Path) -> None:
    """Save a language model and a vision tower of a size, with seeded weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    for name, model in (
        ("llm", LlamaForCausalLM(LlamaConfig(**size.text_config()))),
        ("tower", CLIPVisionModel(CLIPVisionConfig(**size.vision_config()))),
    ):
        fill(dict(model.named_parameters()))
        model.save_pretrained(directory / name)
    processor = json.loads((TINY / "tower" / "preprocessor_config.json").read_text(encoding="utf-8"))
    side = size.image_size
    processor |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    (directory / "tower" / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    for file in (TINY / "llm").glob("tokenizer*"):
        shutil.copy(file, directory / "llm")


def make_records(size: Size, num_records: int, directory: Path) -> None:
    """Write images, captions.json and conversations.json, about as long as the batches of benchmarks.workload."""
    draw, images = random.Random(0), directory / "images"
    images.mkdir()
    for i in range(NUM_IMAGES):
        coarse = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size.image_size, size.image_size)).save(images / f"{i}.jpg")

    def text(least, most):
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    lengths = {"captions": ((1, 1), (10, 60)), "conversations": ((20, 180), (30, 120))}
    for name, (asked, answered) in lengths.items():
        records = [
            {
                "id": f"{i:06d}",
                "image": f"{i % NUM_IMAGES}.jpg",
                "conversations": [
                    {"from": "human", "value": f"<image>\n{text(*asked)}"},
                    {"from": "gpt", "value": text(*answered)},
                ],
            }
            for i in range(num_records)
        ]
        (directory / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")


def get_flags(stage: int, base: Path, batch_size: int, num_steps: int, out: Path) -> list[str]:
    """Return the flags of a stage; stages 2 and 3 start from base/stage1 and base/stage2."""
    tower = f"--vision_tower {base / 'tower'} --mm_projector_type mlp2x_gelu"
    start = {
        1: f"--model_name_or_path {base / 'llm'} {tower} --tune_mm_mlp_adapter True --version plain",
        2: f"--model_name_or_path {base / 'llm'} {tower} --version v1 "
        f"--pretrain_mm_mlp_adapter {base / 'stage1' / 'mm_projector.bin'}",
        3: f"--model_name_or_path {base / 'stage2'} --version v1 {EXPERTS}",
    }[stage]
    records = base / f"{'captions' if stage == 1 else 'conversations'}.json"
    text = f"{start} --data_path {records} --image_folder {base / 'images'} {COMMON} --max_steps {num_steps} "
    return f"{text} --per_device_train_batch_size {batch_size} --output_dir {out}".split()


def read_seconds_per_token(directory: Path, num_warmup: int) -> float:
    """Return the mean of the steps after the warm-up, from the run's metrics.jsonl."""
    rates = [line["tokens_per_s"] for line in read_log(directory)][num_warmup:]
    return sum(1 / rate for rate in rates) / len(rates)


def measure(trees: dict[str, Path], stages: list[int], size: str, steps: tuple[int, int], args) -> dict:
    """Return {stage: {checkout: figures}}, ratios over the checkout before."""
    results = {}
    with TemporaryDirectory() as scratch:
        base, out = Path(scratch), Path(scratch, "out")
        make_base(size_of(size, 2), base)
        make_records(size_of(size, 2), sum(steps) * size_of(size, 2).batch_size, base)

        def train(name, stage, num_steps, directory):
            flags = get_flags(stage, base, size_of(size, stage).batch_size, num_steps, directory)
            run(trees[name], "llava_lite.train.train", *flags, threads=args.threads)

        # What a stage starts from is saved by the older checkout; the newer one opens it too.
        for stage in range(1, max(stages)):
            train(BEFORE, stage, 1, base / f"stage{stage}")
        for stage in stages:

            def start(name, turn, stage=stage):
                train(name, stage, sum(steps), out)
                seconds = read_seconds_per_token(out, steps[0])
                shutil.rmtree(out)
                return {"wall_s": seconds, "cpu_s": seconds}

            reports = run_rounds(start, [BEFORE, AFTER], AFTER, args.rounds)
            results[str(stage)] = summary(get_samples(reports), BEFORE)
            show(stage, results[str(stage)])
    return results


def show(stage: int, figures: dict) -> None:
    """Print speeds and ratio of a stage."""
    after = figures[AFTER]
    (low, high), (self_low, self_high) = after["ratio_range"], after["self_range"]
    print(
        f"stage {stage}: {figures[BEFORE]['rate']:.0f} tokens/s before, {after['rate']:.0f} after, "
        f"ratio {after['ratio']:.2f} ({low:.2f}-{high:.2f}), over itself {after['self_ratio']:.2f} "
        f"({self_low:.2f}-{self_high:.2f})",
        flush=True,
    )


def add_flags(parser) -> None:
    """Add the flags of this comparison."""
    parser.add_argument("--before", type=Path, required=True, help="checkout to compare this one with")
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--gate", type=float, default=0.8, help="least ratio of speeds (default: 0.8)")


def main(argv=None) -> int:
    """Print a line for each stage; return 1 if a ratio is below the gate."""
    args = arguments(__doc__.splitlines()[0], argv, add_flags, rounds=3)
    trees = {BEFORE: args.before.resolve(), AFTER: ROOT}
    size, steps = ("toy", QUICK_STEPS) if args.quick else ("S", STEPS)
    results = measure(trees, sorted(args.stages), size, steps, args)
    write_result("same_speed", results, args.json, args.threads, rounds=args.rounds, quick=args.quick)
    return int(any(figures[AFTER]["ratio"] < args.gate for figures in results.values()))


if __name__ == "__main__":
    sys.exit(main())
