"""Turn the folders of the three stages into report.json, a table and a picture of it all.

python -m playground.tiny.report --out quickstart --ranks 2

Reads, below --out: stageN/metrics.jsonl (the trainer's), stageN/answers.json (ask's) and seconds.tsv, a line
`name<TAB>seconds` for each part of the run, stages under their folder's name.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from llava_lite.inference import load
from llava_lite.model.upcycle import upcycle
from llava_lite.train.run_log import read_metrics

from .ask import accuracy
from .picture import draw_report
from .world import DIRECT, SEARCH

STAGES = ("stage1", "stage2", "stage3")
# What the tiny world is made to reach; shares of 1.
MIN_PICTURE = 0.90
MIN_KIND = 0.80
MAX_MAJORITY = 0.40
MAX_BLANK_GAP = 0.05
MAX_STAGE1 = 0.60
MIN_EXPERT_LOAD = 0.10
# The loss and the expert load of a stage are means over its last steps.
LAST_SHARE = 0.1


def mean(values):
    """Return the mean of some numbers."""
    values = list(values)
    return sum(values) / len(values)


def read_seconds(path):
    """Return {part: seconds} of a seconds.tsv, {} where there is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {name: float(seconds) for name, seconds in (line.split("\t") for line in lines)}


def last_lines(folder):
    """Return the lines of a stage's metrics, and the last tenth of them."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    if not lines:
        raise ValueError(f"no losses in {folder / 'metrics.jsonl'}; has {folder.name} been trained?")
    return lines, lines[-max(1, round(LAST_SHARE * len(lines))) :]


def read_asked(folder):
    """Return the records that `ask` wrote for a stage."""
    return json.loads((folder / "answers.json").read_text())["records"]


def direct_accuracy(asked, field="picture"):
    """Return the mean over the direct kinds of the share that was right."""
    shares = accuracy(asked, field)
    return mean(shares[kind] for kind in DIRECT)


def stage_report(folder, seconds, ranks):
    """Return what report.json says about one stage. tokens_per_s: of all ranks together, padding not counted."""
    lines, last = last_lines(folder)
    return {
        "stage": folder.name,
        "loss": mean(line.get("lm_loss", line["loss"]) for line in last),
        "tokens_per_s": ranks * mean(line["tokens_per_s"] for line in lines[1:] or lines),
        "seconds": seconds.get(folder.name),
        "accuracy": direct_accuracy(read_asked(folder)),
    }


def majority(asked, kind):
    """Return the share of the most frequent right answer of a kind."""
    answers = Counter(record["answer"] for record in asked if record["kind"] == kind)
    return max(answers.values()) / answers.total()


def accuracy_report(asked):
    """Return the accuracies of the last stage: direct kinds one by one and together, search and captions apart."""
    seen, blank = accuracy(asked), accuracy(asked, "blank")
    by_kind = {
        "by_kind": {kind: seen[kind] for kind in DIRECT},
        "blank_by_kind": {kind: blank[kind] for kind in DIRECT},
        "majority_by_kind": {kind: majority(asked, kind) for kind in DIRECT},
    }
    together = zip(("picture", "blank", "majority"), by_kind.values(), strict=True)
    return {
        **{name: mean(shares.values()) for name, shares in together},
        **by_kind,
        "search": mean(seen[kind] for kind in SEARCH),
        "caption": seen["caption"],
    }


def expert_load(folder):
    """Return {layer: share of the choices of each expert} over the last steps of stage 3."""
    _, last = last_lines(folder)
    reports = [line["experts"] for line in last]
    return {
        layer: [mean(shares) for shares in zip(*(r[layer]["load"] for r in reports), strict=True)]
        for layer in reports[0]
    }


def moved(start, now):
    """Return how far weights went, as a share of their size at the start."""
    return ((now - start).norm() / start.norm()).item()


def expert_moves(dense_folder, moe_folder, seed):
    """Return how far routers and experts went from their start, which is made again from stage 2 and the seed."""
    start, _ = load(dense_folder, device="cpu", dtype=torch.float32)
    now, _ = load(moe_folder, device="cpu", dtype=torch.float32)
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


def make_report(out, ranks, seed):
    """Return the whole report of a finished quickstart."""
    seconds = read_seconds(out / "seconds.tsv")
    folders = [out / stage for stage in STAGES]
    return {
        "seconds": sum(seconds.values()),
        "stages": [stage_report(folder, seconds, ranks) for folder in folders],
        "accuracy": accuracy_report(read_asked(folders[-1])),
        "experts": {"load": expert_load(folders[-1]), **expert_moves(folders[1], folders[2], seed)},
    }


def missed_figures(report):
    """Return a sentence for each figure that the tiny world is made to reach and did not."""
    found, experts = report["accuracy"], report["experts"]
    missed = []
    if found["picture"] < MIN_PICTURE:
        missed.append(f"direct questions {found['picture']:.1%}, expected {MIN_PICTURE:.0%}")
    for kind, share in found["by_kind"].items():
        blank, most = found["blank_by_kind"][kind], found["majority_by_kind"][kind]
        if share < MIN_KIND:
            missed.append(f"{kind} {share:.1%}, expected {MIN_KIND:.0%}")
        if abs(blank - most) > MAX_BLANK_GAP:
            missed.append(f"{kind} of a blank picture {blank:.1%}, expected about {most:.1%}")
        if most >= MAX_MAJORITY:
            missed.append(f"most frequent answer to {kind} {most:.1%}, expected under {MAX_MAJORITY:.0%}")
    if report["stages"][0]["accuracy"] >= MAX_STAGE1:
        missed.append(f"after stage 1 {report['stages'][0]['accuracy']:.1%}, expected under {MAX_STAGE1:.0%}")
    for layer, shares in experts["load"].items():
        if min(shares) <= MIN_EXPERT_LOAD:
            missed.append(f"least used expert of layer {layer} {min(shares):.1%}, expected over {MIN_EXPERT_LOAD:.0%}")
    still = [layer for layer, share in experts["router_moved"].items() if share == 0]
    still += [layer for layer, shares in experts["experts_moved"].items() if min(shares) == 0]
    if still:
        missed.append(f"routers or experts that did not move in layers {sorted(set(still))}")
    return missed


def table(report, blanks):
    """Return the final table as text. blanks: accuracy with a blank picture after each stage."""
    lines = [f"{'stage':<10}{'loss':>8}{'tokens/s':>12}{'seconds':>10}{'picture':>10}{'blank':>8}"]
    for stage, blank in zip(report["stages"], blanks, strict=True):
        seconds = "-" if stage["seconds"] is None else f"{stage['seconds']:.0f}"
        lines.append(
            f"{stage['stage']:<10}{stage['loss']:>8.3f}{stage['tokens_per_s']:>12,.0f}{seconds:>10}"
            f"{stage['accuracy']:>10.1%}{blank:>8.1%}"
        )
    found = report["accuracy"]
    lines.append("")
    for kind, share in found["by_kind"].items():
        blank, most = found["blank_by_kind"][kind], found["majority_by_kind"][kind]
        lines.append(f"{kind:<10}{share:>8.1%}   blank {blank:.1%}, most frequent answer {most:.1%}")
    lines += [f"{name:<10}{found[name]:>8.1%}" for name in ("search", "caption")]
    for layer, shares in report["experts"]["load"].items():
        lines.append(f"experts of layer {layer}: " + " ".join(f"{share:.1%}" for share in shares))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the quickstart")
    parser.add_argument("--ranks", type=int, default=1, help="processes that trained")
    parser.add_argument("--seed", type=int, default=42, help="--seed of stage 3")
    args = parser.parse_args()
    with tqdm(total=2, desc="report", unit="part") as bar:
        report = make_report(args.out, args.ranks, args.seed)
        (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        bar.update()
        asked = [read_asked(args.out / stage) for stage in STAGES]
        draw_report(args.out, report, asked[-1])
        bar.update()
    print(table(report, [direct_accuracy(records, "blank") for records in asked]))
    missed = missed_figures(report)
    for sentence in missed:
        print(f"missed: {sentence}", file=sys.stderr)
    print(f"{args.out / 'report.json'}, {args.out / 'report.png'}; {report['seconds']:.0f} s in all")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
