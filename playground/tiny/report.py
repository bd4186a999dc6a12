"""Turn the directories of a system's stages into report.json, a table and an image of it all.

python -m playground.tiny.report --out quickstart --ranks 2

Reads, below --out: stageN/metrics.jsonl (the trainer's), stageN/answers.json (ask's) and seconds.tsv, a line
`name<TAB>seconds` for each part of the run, stages under their directory's name. Of LLaVA's stages also what
`llava-lite eval` wrote: eval/BENCHMARK/results.json.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from llava_lite.inference import load
from llava_lite.model.moe.upcycle import upcycle
from llava_lite.train.monitor.log_lines import read_metrics

from .ask import accuracy
from .figure import draw_report
from .systems import LLAVA, SYSTEMS
from .world import DIRECT, SEARCH

STAGES = SYSTEMS[LLAVA].stages
# What the tiny world is made to reach, beside the figures of a system; fractions of 1.
MAX_MAJORITY = 0.40
MAX_BLANK_GAP = 0.05
MAX_STAGE1 = 0.60
MIN_EXPERT_LOAD = 0.10
# The loss and the expert load of a stage are means over its last steps.
LAST_FRACTION = 0.1


def mean(values):
    """Return the mean of some numbers."""
    values = list(values)
    return sum(values) / len(values)


def read_seconds(path):
    """Return {part: seconds} of a seconds.tsv, {} where there is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {name: float(seconds) for name, seconds in (line.split("\t") for line in lines)}


def last_lines(directory):
    """Return the lines of a stage's metrics, and the last tenth of them."""
    lines = [line for line in read_metrics(directory / "metrics.jsonl") if "loss" in line]
    if not lines:
        raise ValueError(f"no losses in {directory / 'metrics.jsonl'}; has {directory.name} been trained?")
    return lines, lines[-max(1, round(LAST_FRACTION * len(lines))) :]


def read_asked(directory):
    """Return the records that `ask` wrote for a stage."""
    return json.loads((directory / "answers.json").read_text())["records"]


def direct_accuracy(asked, field="with_image"):
    """Return the mean over the direct kinds of the fraction that was right."""
    fractions = accuracy(asked, field)
    return mean(fractions[kind] for kind in DIRECT if kind in fractions)


def stage_report(directory, seconds, ranks):
    """Return what report.json says about one stage. tokens_per_s: of all ranks together, padding not counted."""
    lines, last = last_lines(directory)
    return {
        "stage": directory.name,
        "loss": mean(line.get("lm_loss", line["loss"]) for line in last),
        "tokens_per_s": ranks * mean(line["tokens_per_s"] for line in lines[1:] or lines),
        "seconds": seconds.get(directory.name),
        "accuracy": direct_accuracy(read_asked(directory)),
    }


def majority(asked, kind):
    """Return the fraction of the most frequent right answer of a kind."""
    answers = Counter(record["answer"] for record in asked if record["kind"] == kind)
    return max(answers.values()) / answers.total()


def accuracy_report(asked):
    """Return the accuracies of the last stage: direct kinds one by one and together, all others apart."""
    seen, blank = accuracy(asked), accuracy(asked, "blank")
    direct = [kind for kind in DIRECT if kind in seen]
    by_kind = {
        "by_kind": {kind: seen[kind] for kind in direct},
        "blank_by_kind": {kind: blank[kind] for kind in direct},
        "majority_by_kind": {kind: majority(asked, kind) for kind in direct},
    }
    apart = {"search": [seen[kind] for kind in SEARCH if kind in seen]}
    apart |= {kind: [seen[kind]] for kind in ("caption", "sound") if kind in seen}
    together = zip(("with_image", "blank", "majority"), by_kind.values(), strict=True)
    return {
        **{name: mean(fractions.values()) for name, fractions in together},
        **by_kind,
        **{name: mean(fractions) for name, fractions in apart.items() if fractions},
    }


def expert_load(directory):
    """Return {layer: fraction of the assignments of each expert} over the last steps of stage 3."""
    _, last = last_lines(directory)
    reports = [line["experts"] for line in last]
    return {
        layer: [mean(fractions) for fractions in zip(*(r[layer]["load"] for r in reports), strict=True)]
        for layer in reports[0]
    }


def moved(start, now):
    """Return how far weights went, as a fraction of their size at the start."""
    return ((now - start).norm() / start.norm()).item()


def expert_moves(dense_directory, moe_directory, seed):
    """Return how far routers and experts went from their start, which is made again from stage 2 and the seed."""
    start, _ = load(dense_directory, device="cpu", dtype=torch.float32)
    now, _ = load(moe_directory, device="cpu", dtype=torch.float32)
    upcycle(start, now.config.moe, seed)
    routers, experts = {}, {}
    for layer, block in now.moe_layers().items():
        first = start.moe_layers()[layer]
        routers[str(layer)] = moved(first.gate.weight, block.gate.weight)
        pairs = list(zip(first.experts.parameters(), block.experts.parameters(), strict=True))
        num_experts = len(pairs[0][0])
        experts[str(layer)] = [
            mean(moved(before[expert], after[expert]) for before, after in pairs) for expert in range(num_experts)
        ]
    return {"router_moved": routers, "experts_moved": experts}


def benchmark_report(directory):
    """Return {title: what `llava-lite eval` found} of the benchmarks below a directory, {} where there are none."""
    reports = [json.loads(path.read_text()) for path in sorted(directory.glob("*/results.json"))]
    kept = ("metric", "score", "interval_95", "num_questions", "scores")
    return {report["title"]: {name: report[name] for name in kept} for report in reports}


def make_report(out, ranks, seed, system=SYSTEMS[LLAVA]):
    """Return the complete report of a finished quickstart."""
    seconds = read_seconds(out / "seconds.tsv")
    directories = [out / stage for stage in system.stages]
    report = {
        "seconds": sum(seconds.values()),
        "stages": [stage_report(directory, seconds, ranks) for directory in directories],
        "accuracy": accuracy_report(read_asked(directories[-1])),
    }
    benchmarks = benchmark_report(out / "eval")
    if benchmarks:
        report["benchmarks"] = benchmarks
    if system.has_experts:
        moves = expert_moves(directories[1], directories[2], seed)
        report["experts"] = {"load": expert_load(directories[-1]), **moves}
    return report


def missed_figures(report, system=SYSTEMS[LLAVA]):
    """Return a sentence for each figure that the tiny world is made to reach and did not."""
    found = report["accuracy"]
    missed = []
    if found["with_image"] < system.min_image:
        missed.append(f"direct questions {found['with_image']:.1%}, expected {system.min_image:.0%}")
    if system.min_sound is not None and found["sound"] < system.min_sound:
        missed.append(f"by sound alone {found['sound']:.1%}, expected {system.min_sound:.0%}")
    for kind, fraction in found["by_kind"].items():
        blank, most = found["blank_by_kind"][kind], found["majority_by_kind"][kind]
        if fraction < system.min_kind:
            missed.append(f"{kind} {fraction:.1%}, expected {system.min_kind:.0%}")
        if abs(blank - most) > MAX_BLANK_GAP:
            missed.append(f"{kind} of a blank image {blank:.1%}, expected about {most:.1%}")
        if most >= MAX_MAJORITY:
            missed.append(f"most frequent answer to {kind} {most:.1%}, expected under {MAX_MAJORITY:.0%}")
    if report["stages"][0]["accuracy"] >= MAX_STAGE1:
        missed.append(f"after stage 1 {report['stages'][0]['accuracy']:.1%}, expected under {MAX_STAGE1:.0%}")
    return missed + (missed_experts(report["experts"]) if system.has_experts else [])


def missed_experts(experts):
    """Return a sentence for each figure of the experts that was not reached."""
    missed = []
    for layer, fractions in experts["load"].items():
        if min(fractions) <= MIN_EXPERT_LOAD:
            missed.append(
                f"least used expert of layer {layer} {min(fractions):.1%}, expected over {MIN_EXPERT_LOAD:.0%}"
            )
    still = [layer for layer, fraction in experts["router_moved"].items() if fraction == 0]
    still += [layer for layer, fractions in experts["experts_moved"].items() if min(fractions) == 0]
    if still:
        missed.append(f"routers or experts that did not move in layers {sorted(set(still))}")
    return missed


def table(report, blank_accuracies):
    """Return the final table as text. blank_accuracies: accuracy with a blank image after each stage."""
    lines = [f"{'stage':<10}{'loss':>8}{'tokens/s':>12}{'seconds':>10}{'with_image':>10}{'blank':>8}"]
    for stage, blank in zip(report["stages"], blank_accuracies, strict=True):
        seconds = "-" if stage["seconds"] is None else f"{stage['seconds']:.0f}"
        lines.append(
            f"{stage['stage']:<10}{stage['loss']:>8.3f}{stage['tokens_per_s']:>12,.0f}{seconds:>10}"
            f"{stage['accuracy']:>10.1%}{blank:>8.1%}"
        )
    found = report["accuracy"]
    lines.append("")
    for kind, fraction in found["by_kind"].items():
        blank, most = found["blank_by_kind"][kind], found["majority_by_kind"][kind]
        lines.append(f"{kind:<10}{fraction:>8.1%}   blank {blank:.1%}, most frequent answer {most:.1%}")
    lines += [f"{name:<10}{found[name]:>8.1%}" for name in ("search", "caption", "sound") if name in found]
    for layer, fractions in report.get("experts", {"load": {}})["load"].items():
        lines.append(f"experts of layer {layer}: " + " ".join(f"{fraction:.1%}" for fraction in fractions))
    return "\n".join(lines + benchmark_lines(report.get("benchmarks", {})))


def benchmark_lines(benchmarks):
    """Return a line for each benchmark: its score, or those of its tasks where it has no sum."""
    lines = []
    for title, found in benchmarks.items():
        tasks = {name: score for name, score in found["scores"].items() if ":" not in name}
        scores = {found["metric"]: found["score"]} if found["score"] is not None else tasks
        shown = ", ".join(f"{name} {score:.1f}" for name, score in scores.items())
        lines.append(f"{title} ({found['num_questions']} questions): {shown}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the quickstart")
    parser.add_argument("--ranks", type=int, default=1, help="processes that trained")
    parser.add_argument("--system", choices=SYSTEMS, default=LLAVA, help="what was trained")
    parser.add_argument("--seed", type=int, default=42, help="--seed of stage 3")
    args = parser.parse_args()
    system = SYSTEMS[args.system]
    with tqdm(total=2, desc="report", unit="part") as bar:
        report = make_report(args.out, args.ranks, args.seed, system)
        (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        bar.update()
        asked = [read_asked(args.out / stage) for stage in system.stages]
        draw_report(args.out, report, asked[-1])
        bar.update()
    print(table(report, [direct_accuracy(records, "blank") for records in asked]))
    missed = missed_figures(report, system)
    for sentence in missed:
        print(f"missed: {sentence}", file=sys.stderr)
    print(f"{args.out / 'report.json'}, {args.out / 'report.png'}; {report['seconds']:.0f} s in all")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
