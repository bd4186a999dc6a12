"""Turn each item that makes training faster into what it buys: the step without it over the step with all of them.

    python -m benchmarks.ablation [--quick] [--json FILE] [--sizes S] [--stages 1 2 3]

One model in one process, whose items are switched between two steps; batches and weights as in benchmarks.training.
"""

from __future__ import annotations

import contextlib
import inspect
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
    """A step with some items switched."""

    plain_paths: frozenset[str] = frozenset()
    packing: bool = True
    onednn: bool = True
    checkpointing: bool = False
    cached_features: bool = False


def variants_of(stage: int, takes_features: bool) -> dict[str, Variant]:
    """Return {name: Variant}; takes_features: whether the model reads cached features of a frozen tower."""
    from llava_lite.model.plain_paths import PLAIN_PATHS

    # Without experts there is no path for them.
    paths = [path for path in PLAIN_PATHS if path != "experts" or stage == 3]
    variants = {ALL_ON: Variant()}
    variants |= {f"{path} off": Variant(frozenset({path})) for path in paths}
    variants |= {"packing off": Variant(packing=False), "oneDNN products off": Variant(onednn=False)}
    variants["gradient checkpointing on"] = Variant(checkpointing=True)
    if takes_features:
        variants["feature cache on"] = Variant(cached_features=True)
    variants["all off"] = Variant(frozenset(paths), packing=False, onednn=False)
    return variants


class Bench:
    """A model and its optimizer; `step` does one step of a variant on a batch."""

    def __init__(self, size, stage):
        self.model = our_model(size, stage)
        self.parameters = choose_what_trains(self.model, stage)
        self.optimizer = make_optimizer(self.parameters, size)
        self.losses = {}

    @property
    def takes_features(self) -> bool:
        """Whether `forward` reads features of pictures in place of pictures."""
        return "image_features" in inspect.signature(self.model.forward).parameters

    def collate(self, examples, variant, features) -> dict:
        """Return the batch as the trainer's collator makes it; features: of the pictures, where they are cached."""
        from llava_lite.data.collator import DataCollatorForSupervisedDataset, PackedCollator

        collator = PackedCollator() if variant.packing else DataCollatorForSupervisedDataset(PAD)
        batch = collator(examples)
        del batch["sample_ids"]
        if variant.cached_features:
            del batch["images"]
            batch["image_features"] = features
        return batch

    def features(self, examples):
        """Return what the frozen tower makes of the pictures of a batch."""
        pictures = torch.stack([picture for example in examples for picture in example["images"]])
        with torch.no_grad():
            return self.model.get_vision_tower()(pictures)

    def step(self, examples, variant, features=None) -> float:
        """Do one step and return its loss."""
        from llava_lite.model.plain_paths import set_plain_paths

        set_plain_paths(self.model, variant.plain_paths)
        if variant.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        plain = torch.backends.mkldnn.flags(enabled=False) if not variant.onednn else contextlib.nullcontext()
        with plain:
            output = self.model(**self.collate(examples, variant, features), use_cache=False)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return output.loss.item()


def measure(size: str, stage: int, rounds: int) -> dict:
    """Return for each variant: the step's time over that with all items on, and the spread of that one with itself."""
    shape = size_of(size, stage)
    bench = Bench(shape, stage)
    schedule = batches(shape, stage, rounds + WARMUP)
    features = [bench.features(examples) if bench.takes_features else None for examples in schedule]
    variants = variants_of(stage, bench.takes_features)
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
    print(f"size {size}, stage {stage}: time of a step relative to all on (itself: {low:.2f}-{high:.2f})")
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
    from llava_lite.train.heap import keep_freed_memory

    args = arguments(__doc__.splitlines()[0], argv, add_flags)
    torch.set_num_threads(args.threads)
    # For all variants, as the trainer does: it holds for a process, not for a step.
    keep_freed_memory()
    # Of transformers 6's names and of oneDNN's settings, at every switch.
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
