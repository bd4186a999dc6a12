"""Turn the three stages of training into tokens per second and memory: ours, Hugging Face's transformers, LLaVA.

    python -m benchmarks.training [--quick] [--json FILE] [--sizes S V] [--stages 1 2 3]
    python -m benchmarks.training --llava DIRECTORY_OF_LLAVA --python-path DIRECTORY_OF_TRANSFORMERS_4_37

Each rival runs alone in its own process, warms up, and is timed for some steps; the processes of a round follow each
other in random order. All rivals have the same seeded weights, batches and optimizer. The learning rate is 0, so that
they stay the same function: every loss and every gradient norm of the run is compared. Rounds differ in their batches.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics

from benchmarks.alone import get_samples, run_alone, run_rounds
from benchmarks.timing import AGAIN, arguments, summary, write_result
from benchmarks.workload import IGNORE_INDEX, batches, count_tokens, size_of

OURS = "ours"
TORCH_MATMUL = "ours, torch's matmul"
LLAVA = "LLaVA (with its checkpointing)"
CHECKPOINTING = " +ckpt"
# Steps of a process: those that warm it up, and those that are timed. Of size V starting takes longer than a step.
STEPS = {"S": (1, 2), "V": (1, 1), "toy": (1, 1)}
MOST_ROUNDS = {"V": 2}
# Runs of transformers that go on after the first round, in which all of them run: the fastest ones.
NUM_KEPT = 2


def get_rivals(size: str, stage: int) -> dict[str, tuple[str, dict]]:
    """Return {name: (key of RIVALS, options)} of the runners of a size and stage."""
    from llava_lite.model.fast.matmul import has_wide_vectors

    rivals = {OURS: ("ours", {})}
    kinds = {"": {}} if stage < 3 else {f" {kind}": {"experts": kind} for kind in ("eager", "grouped_mm")}
    if size == "V":
        # Eager is the faster of the two here, and a process takes half a minute.
        kinds = dict([*kinds.items()][:1])
    rivals |= {f"transformers{name}": ("transformers loop", options) for name, options in kinds.items()}
    if size == "V":
        # Recomputing is slower in every stage of size S too, and here it takes minutes.
        return rivals
    if has_wide_vectors():
        # The speed that is left where torch's own matmul is as fast, for instance on other processors.
        rivals[TORCH_MATMUL] = ("ours", {"plain_paths": ["matmul"]})
    name, options = list(kinds.items())[-1]
    return rivals | {
        f"transformers{name}{CHECKPOINTING}": ("transformers loop", {**options, "checkpointing": True}),
        f"transformers Trainer{name}": ("transformers Trainer", options),
    }


def is_transformers(name: str) -> bool:
    """Return whether a rival is a run of transformers' own model."""
    return name.startswith("transformers")


def measure(size: str, stage: int, rounds: int, threads: int, llava: str | None = None) -> dict:
    """Return the figures of all rivals of a size and stage. llava: directories that LLaVA is imported from."""
    rounds = min(rounds, MOST_ROUNDS.get(size, rounds))
    num_warmup, num_steps = STEPS[size]
    rivals = get_rivals(size, stage)
    if llava is not None and stage < 3 and size != "V":
        rivals[LLAVA] = ("LLaVA", {})

    def start(name, seed):
        rival, options = rivals[name]
        spec = {"rival": rival, "options": options, "size": size, "stage": stage, "seed": seed, "threads": threads}
        spec |= {"num_warmup": num_warmup, "num_steps": num_steps}
        paths = llava if name == LLAVA else None
        return run_alone("benchmarks.worker", json.dumps(spec), threads=threads, python_path=paths)

    reports = run_rounds(start, list(rivals), OURS, 1)
    for name, more in run_rounds(start, keep_fastest(reports), OURS, rounds - 1, first=1).items():
        reports[name] += more
    schedules = [batches(size_of(size, stage), stage, num_warmup + num_steps, seed) for seed in range(rounds)]
    tokens = [sum(map(count_tokens, schedule[num_warmup:])) for schedule in schedules]
    return compare(reports, tokens) | {"batches": describe(size, stage, list(itertools.chain(*schedules)))}


def keep_fastest(reports) -> list[str]:
    """Return the rivals that run in all rounds: ours, LLaVA, and the fastest of transformers' runs of the first."""
    names = [name for name in reports if not name.endswith(AGAIN)]
    theirs = sorted(filter(is_transformers, names), key=lambda name: reports[name][0]["wall_s"])
    return [name for name in names if not is_transformers(name) or name in theirs[:NUM_KEPT]]


def compare(reports, tokens) -> dict:
    """Return each rival's figures, ratios over the fastest run of transformers, and ours over the others."""
    samples = get_samples(reports)
    figures = summary(samples, OURS, tokens)
    theirs = [name for name in figures if is_transformers(name)]
    in_all_rounds = [name for name in theirs if len(reports[name]) == len(tokens)]
    fastest = max(in_all_rounds, key=lambda name: figures[name]["rate"])
    figures = summary(samples, fastest, tokens)
    for name, one in figures.items():
        for key in ("loaded_bytes", "above_loaded_bytes"):
            one[key] = statistics.median(report[key] for report in reports[name])
        for key in ("losses", "gradient_norms"):
            one[key] = [number for report in reports[name] for number in report[key]]
    ours = figures[OURS]
    plain = [name for name in theirs if CHECKPOINTING not in name]
    leanest = min(plain, key=lambda name: figures[name]["above_loaded_bytes"])
    # Where oneDNN's matmul is no faster, ours is the run with torch's.
    by_torch = figures.get(TORCH_MATMUL, ours)
    result = {
        "rivals": figures,
        "fastest_transformers": fastest,
        "leanest_transformers": leanest,
        "over_transformers": {
            key: ours[key] for key in ("ratio", "ratio_range", "ratio_cpu", "self_ratio", "self_range")
        },
        "over_transformers_by_torch_matmul": {key: by_torch[key] for key in ("ratio", "ratio_range")},
        "memory_fraction": ours["above_loaded_bytes"] / figures[leanest]["above_loaded_bytes"],
        "largest_loss_difference": _largest(figures, "losses"),
        "largest_norm_difference": _largest(figures, "gradient_norms"),
    }
    if LLAVA in figures:
        over = summary(samples, LLAVA, tokens)[OURS]
        result["over_llava"] = {key: over[key] for key in ("ratio", "ratio_range", "ratio_cpu")}
    return result


def _largest(figures, key) -> float:
    ours = figures[OURS][key]
    others = [one[key] for name, one in figures.items() if name != OURS]
    # Some rivals run in the first round only.
    return max(abs(a - b) for other in others for a, b in zip(ours, other, strict=False))


def describe(size: str, stage: int, schedule) -> dict:
    """Return what the batches hold: tokens, fractions of padding and supervised tokens, weight of the logits."""
    tokens = sum(map(count_tokens, schedule))
    positions = sum(len(batch) * max(len(one["input_ids"]) for one in batch) for batch in schedule)
    supervised = sum(int((one["labels"] != IGNORE_INDEX).sum()) for batch in schedule for one in batch)
    return {
        "samples_per_step": len(schedule[0]),
        "tokens_per_step": tokens / len(schedule),
        "padding_fraction": 1 - tokens / positions,
        "supervised_fraction": supervised / tokens,
        "logits_fraction": size_of(size, stage).logits_fraction(stage),
        "optimizer": size_of(size, stage).optim,
    }


def show(size: str, stage: int, result: dict) -> None:
    """Print the table of a size and stage."""
    print(f"size {size}, stage {stage}: {result['batches']}")
    print(f"{'':32}{'tokens/s':>10}{'CPU s/ktok':>12}{'ratio':>8}{'range':>14}{'MB above loaded':>17}{'loss':>10}")
    for name, one in result["rivals"].items():
        low, high = one["ratio_range"]
        print(
            f"{name:32}{one['rate']:10.0f}{1000 * one['cpu_s_per_unit']:12.2f}{one['ratio']:8.2f}"
            f"{f'{low:.2f}-{high:.2f}':>14}{one['above_loaded_bytes'] / 2**20:17.0f}{one['losses'][0]:10.4f}"
        )
    low, high = result["rivals"][OURS]["self_range"]
    print(
        f"ours over itself {low:.2f}-{high:.2f}; "
        f"memory {result['memory_fraction']:.2f} of {result['leanest_transformers']}; "
        f"losses within {result['largest_loss_difference']:.1e}, norms {result['largest_norm_difference']:.1e}"
    )
    if "over_llava" in result:
        print(f"over LLaVA's own code: {result['over_llava']['ratio']:.2f}")
    print(flush=True)


def add_flags(parser):
    """Add the flags of this benchmark."""
    parser.add_argument(
        "--sizes", nargs="+", default=["S", "V"], help="S: the head is 39%% of the decoder; V: 2%%, as in a 7B model"
    )
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--llava", help="directory that holds the original package `llava`")
    parser.add_argument("--python-path", help="directory with the libraries that it needs (transformers 4.37)")


def main(argv=None) -> dict:
    """Measure, print, and return what is written to --json."""
    args = arguments(__doc__.splitlines()[0], argv, add_flags, rounds=3)
    sizes = ["toy"] if args.quick else args.sizes
    llava = os.pathsep.join(path for path in (args.llava, args.python_path) if path) or None
    results = {}
    for size in sizes:
        for stage in args.stages:
            result = measure(size, stage, args.rounds, args.threads, llava)
            results.setdefault(size, {})[str(stage)] = result
            show(size, stage, result)
            # After each stage, so that an interrupted run keeps what it measured.
            report = write_result("training", results, args.json, args.threads, rounds=args.rounds, quick=args.quick)
    return report


if __name__ == "__main__":
    main()
