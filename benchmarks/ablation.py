"""Measure what each faster path gains in training: the time of a step without it over that of a step with all.

    python -m benchmarks.ablation [--quick] [--json FILE] [--sizes S] [--stages 1 2 3]

One model in one process, whose paths are switched between two steps; batches and weights as in benchmarks.training.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from benchmarks.rivals import choose_what_trains, make_optimizer, our_model
from benchmarks.timing import arguments, interleave, summary, write_result
from benchmarks.workload import PAD, batches, count_tokens, size_of

ALL_ON = "all on"
WARMUP = 1


@dataclass(frozen=True)
class Variant:
    """A step with some paths switched."""

    plain_paths: frozenset[str] = frozenset()
    packing: bool = True
    checkpointing: bool = False
    cached_features: bool = False


def get_variants(stage: int) -> dict[str, Variant]:
    """Return {name: Variant}."""
    from llava_lite.model.fast.matmul import has_wide_vectors

    paths = ["loss", *(["experts"] if stage == 3 else []), *(["matmul"] if has_wide_vectors() else [])]
    variants = {ALL_ON: Variant()}
    variants |= {f"{path} off": Variant(frozenset({path})) for path in paths}
    variants["packing off"] = Variant(packing=False)
    variants["gradient checkpointing on"] = Variant(checkpointing=True)
    variants["feature cache on"] = Variant(cached_features=True)
    variants["all off"] = Variant(frozenset(paths), packing=False)
    return variants


class Bench:
    """A model and its optimizer; `step` does one step of a variant on a batch."""

    def __init__(self, size, stage):
        self.model = our_model(size, stage)
        self.parameters = choose_what_trains(self.model, stage)
        self.optimizer = make_optimizer(self.parameters, size)
        self.losses = {}

    def collate(self, examples, variant, features) -> dict:
        """Return the batch as the trainer's collator makes it; features: of the images, where they are cached."""
        from llava_lite.data.collator import DataCollatorForSupervisedDataset, PackedCollator

        collator = PackedCollator() if variant.packing else DataCollatorForSupervisedDataset(PAD)
        batch = collator(examples)
        del batch["sample_ids"]
        if variant.cached_features:
            del batch["images"]
            batch["image_features"] = features
        return batch

    def features(self, examples):
        """Return the frozen tower's features of the images of a batch."""
        images = torch.stack([image for example in examples for image in example["images"]])
        with torch.no_grad():
            return self.model.get_vision_tower()(images)

    def step(self, examples, variant, features=None) -> float:
        """Do one step and return its loss."""
        from llava_lite.model.plain_paths import set_plain_paths

        set_plain_paths(self.model, variant.plain_paths)
        if variant.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        output = self.model(**self.collate(examples, variant, features), use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return output.loss.item()


def measure(size: str, stage: int, rounds: int) -> dict:
    """Return for each variant the step's time over that with all paths on, and the spread of that one over itself."""
    shape = size_of(size, stage)
    bench = Bench(shape, stage)
    schedule = batches(shape, stage, rounds + WARMUP)
    features = [bench.features(examples) for examples in schedule]
    variants = get_variants(stage)
    losses = {name: [] for name in variants}

    def runner(name):
        def run():
            turn = len(losses[name])
            if name == ALL_ON and turn >= WARMUP:
                turn = WARMUP + (turn - WARMUP) // 2
            losses[name].append(bench.step(schedule[turn], variants[name], features[turn]))

        return run

    samples = interleave({name: runner(name) for name in variants}, rounds, WARMUP, again=ALL_ON)
    tokens = [count_tokens(examples) for examples in schedule[WARMUP:]]
    figures = summary(samples, ALL_ON, tokens)
    for one in figures.values():
        one["relative_time"] = 1 / one["ratio"]
        one["relative_time_cpu"] = 1 / one["ratio_cpu"]
    ours = losses[ALL_ON][:WARMUP] + losses[ALL_ON][WARMUP::2]
    spread = max(abs(a - b) for other in losses if other != ALL_ON for a, b in zip(ours, losses[other], strict=True))
    return {"variants": figures, "largest_loss_difference": spread}


def show(size: str, stage: int, result: dict) -> None:
    """Print the table of a stage."""
    low, high = result["variants"][ALL_ON]["self_range"]
    print(f"size {size}, stage {stage}: time of a step relative to all on (over itself: {low:.2f}-{high:.2f})")
    for name, one in result["variants"].items():
        slow, fast = (1 / ratio for ratio in one["ratio_range"])
        print(
            f"  {name:38}{one['relative_time']:6.2f}  CPU {one['relative_time_cpu']:5.2f}  range {fast:.2f}-{slow:.2f}"
        )
    print(f"  losses within {result['largest_loss_difference']:.1e}", flush=True)


def add_flags(parser):
    """Add the flags of this benchmark."""
    parser.add_argument("--sizes", nargs="+", default=["S"], help="S, V: see benchmarks.workload")
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2, 3])


def main(argv=None) -> dict:
    """Measure, print, and return what is written to --json."""
    args = arguments(__doc__.splitlines()[0], argv, add_flags, rounds=3)
    torch.set_num_threads(args.threads)
    # About names in transformers 6, at every switch of gradient checkpointing.
    warnings.filterwarnings("ignore")
    results = {}
    for size in ["toy"] if args.quick else args.sizes:
        for stage in args.stages:
            result = measure(size, stage, args.rounds)
            results.setdefault(size, {})[str(stage)] = result
            show(size, stage, result)
            report = write_result("ablation", results, args.json, args.threads, rounds=args.rounds, quick=args.quick)
    return report


if __name__ == "__main__":
    main()
