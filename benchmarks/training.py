"""Turn the three stages of training into tokens a second and memory, ours beside stock transformers and LLaVA.

    python -m benchmarks.training [--quick] [--json FILE] [--sizes S V] [--stages 1 2 3]
    python -m benchmarks.training --llava FOLDER_OF_LLAVA --python-path FOLDER_OF_TRANSFORMERS_4_37

All rivals have the same seeded weights, batches and optimizer. The learning rate is 0, so that they also stay the same
function: every loss and every gradient norm of the run is compared. Rounds of a stage differ in their batch, which is
the same for all rivals of a round.
"""

from __future__ import annotations

import os

from benchmarks.timing import arguments, interleave, summary, write_result
from benchmarks.worker import Worker
from benchmarks.workload import IGNORE_INDEX, batches, count_tokens, size_of

OURS = "ours"
PLAIN = "ours, torch's products"
LLAVA = "LLaVA (with its checkpointing)"
WARMUP = 1


def rivals_of(size: str, stage: int) -> dict[str, tuple[str, dict]]:
    """Return {name: (key of RIVALS, options)} of the runners that a size and stage is measured with."""
    rivals = {OURS: ("ours", {})}
    kinds = {"": {}} if stage < 3 else {f" {kind}": {"experts": kind} for kind in ("eager", "grouped_mm")}
    if size == "V":
        # Three models of stage 3 do not fit into 24 GiB; by itself eager is the faster of the two stock ones.
        kinds = dict([*kinds.items()][:1])
    rivals |= {f"stock{name}": ("stock loop", options) for name, options in kinds.items()}
    if size == "V":
        # Recomputing is slower at every stage of size S too, and here it takes minutes.
        return rivals
    name, options = list(kinds.items())[-1]
    return rivals | {
        # What of the lead is left where torch's own products are as fast, such as on other processors.
        PLAIN: ("ours", {"onednn": False}),
        f"stock{name} +ckpt": ("stock loop", {**options, "checkpointing": True}),
        f"stock Trainer{name}": ("stock Trainer", options),
    }


def measure(size: str, stage: int, rounds: int, threads: int, llava: str | None = None) -> dict:
    """Return the figures of all rivals of a size and stage. llava: folders that LLaVA is imported from."""
    count = rounds + WARMUP
    workers = {}
    try:
        for name, (rival, options) in rivals_of(size, stage).items():
            repeats = 2 if name == OURS else 1
            workers[name] = Worker(rival, size, stage, count, repeats, options, threads, warmup=WARMUP)
        if llava is not None and stage < 3 and size != "V":
            workers[LLAVA] = Worker("LLaVA", size, stage, count, threads=threads, python_path=llava)
        runners = {name: worker.wait_ready().step for name, worker in workers.items()}
        samples = interleave(runners, rounds, WARMUP, again=OURS)
        ends = {name: worker.close() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.kill()
    schedule = batches(size_of(size, stage), stage, count)
    tokens = [count_tokens(examples) for examples in schedule]
    return compare(samples, ends, tokens[WARMUP:]) | {"batches": describe(size, stage, schedule)}


def compare(samples, ends, tokens) -> dict:
    """Return each rival's figures, ratios against the fastest stock one, and ours against the others."""
    figures = summary(samples, OURS, tokens)
    stock = [name for name in figures if name.startswith("stock")]
    best = max(stock, key=lambda name: figures[name]["rate"])
    figures = summary(samples, best, tokens)
    for name, end in ends.items():
        # The rival that runs twice says everything twice, but for the warm-up.
        step = 2 if name == OURS else 1
        once = {key: end[key][:WARMUP] + end[key][WARMUP::step] for key in ("losses", "gradient_norms")}
        figures[name] |= end | once
    ours = figures[OURS]
    plain = [name for name in stock if "+ckpt" not in name]
    leanest = min(plain, key=lambda name: figures[name]["above_loaded_bytes"])
    result = {
        "rivals": figures,
        "best_stock": best,
        "leanest_stock": leanest,
        "against_stock": {key: ours[key] for key in ("ratio", "ratio_range", "ratio_cpu", "self_ratio", "self_range")},
        "memory_share": ours["above_loaded_bytes"] / figures[leanest]["above_loaded_bytes"],
        "largest_loss_difference": _largest(figures, "losses"),
        "largest_norm_difference": _largest(figures, "gradient_norms"),
    }
    if PLAIN in figures:
        result["against_stock_with_its_products"] = {key: figures[PLAIN][key] for key in ("ratio", "ratio_range")}
    if LLAVA in figures:
        against = summary(samples, LLAVA, tokens)[OURS]
        result["against_llava"] = {key: against[key] for key in ("ratio", "ratio_range", "ratio_cpu")}
    return result


def _largest(figures, key) -> float:
    ours = figures[OURS][key]
    others = [one[key] for name, one in figures.items() if name != OURS]
    return max(abs(a - b) for other in others for a, b in zip(ours, other, strict=True))


def describe(size: str, stage: int, schedule) -> dict:
    """Return what the batches hold: tokens, shares of padding and of learned positions, weight of the logits."""
    tokens = sum(map(count_tokens, schedule))
    places = sum(len(batch) * max(len(one["input_ids"]) for one in batch) for batch in schedule)
    learned = sum(int((one["labels"] != IGNORE_INDEX).sum()) for batch in schedule for one in batch)
    return {
        "samples_a_step": len(schedule[0]),
        "tokens_a_step": tokens / len(schedule),
        "padding_share": 1 - tokens / places,
        "learned_share": learned / tokens,
        "logits_share": size_of(size, stage).logits_share(stage),
        "optimizer": size_of(size, stage).optim,
    }


def show(size: str, stage: int, result: dict) -> None:
    """Print the table of a size and stage."""
    print(f"size {size}, stage {stage}: {result['batches']}")
    print(f"{'':26}{'tokens/s':>10}{'CPU s/ktok':>12}{'ratio':>8}{'range':>14}{'MB above loaded':>17}{'loss':>10}")
    for name, one in result["rivals"].items():
        low, high = one["ratio_range"]
        print(
            f"{name:26}{one['rate']:10.0f}{1000 * one['cpu_s_per_unit']:12.2f}{one['ratio']:8.2f}"
            f"{f'{low:.2f}-{high:.2f}':>14}{one['above_loaded_bytes'] / 2**20:17.0f}{one['losses'][0]:10.4f}"
        )
    low, high = result["rivals"][OURS]["self_range"]
    print(
        f"ours against itself {low:.2f}-{high:.2f}; memory {result['memory_share']:.2f} of {result['leanest_stock']}; "
        f"losses within {result['largest_loss_difference']:.1e}, norms {result['largest_norm_difference']:.1e}"
    )
    if "against_llava" in result:
        print(f"against LLaVA's own code: {result['against_llava']['ratio']:.2f}")
    print(flush=True)


def add_flags(parser):
    """Add the flags of this benchmark."""
    parser.add_argument("--sizes", nargs="+", default=["S", "V"], help="S: 39%% logits; V: 2%% as in a 7B model")
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--llava", help="folder that holds the original package `llava`")
    parser.add_argument("--python-path", help="folder with the libraries that it needs (transformers 4.37)")


def main(argv=None) -> dict:
    """Measure, print, and return what is written to --json."""
    args = arguments(__doc__.splitlines()[0], argv, add_flags)
    sizes = ["toy"] if args.quick else args.sizes
    llava = os.pathsep.join(path for path in (args.llava, args.python_path) if path) or None
    results = {}
    for size in sizes:
        for stage in args.stages:
            result = measure(size, stage, args.rounds, args.threads, llava)
            results.setdefault(size, {})[str(stage)] = result
            show(size, stage, result)
            # After each stage, so that an interrupted run leaves what it measured.
            report = write_result("training", results, args.json, args.threads, rounds=args.rounds, quick=args.quick)
    return report


if __name__ == "__main__":
    main()
