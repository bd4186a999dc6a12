"""Make the tables of docs/scaling.md: `python -m playground.scaling_page`. Computed, not measured.

The text of the page stands in the page; this file makes the tables between its comment tags.
"""

import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from llava_lite.train.estimate.scale import Cluster, Work, get_fit, get_hours, get_step, get_weights, on, sent_bytes

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
DEVICES = (1, 8, 16, 32, 64, 128, 256, 512)
# Vicuna-7B and 13B, which are Llama 2's shapes, and CLIP-L/14-336.
SIZES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
# Records and batch: LLaVA-1.5's recipes. Tokens: 576 of an image beside captions, and beside chats with a prompt.
STAGES = {
    "1": ("projector", 2, Work(558_128, 606, 28, 1, 256)),
    "2": ("full", 3, Work(665_298, 786, 120, 0.94, 128)),
    "3": ("moe", 3, Work(665_298, 786, 120, 0.94, 128)),
}
MICRO_BATCH = {"1": 16, "2": 8, "3": 4}
# MoE-LLaVA's stage 3: every other layer has four experts, and each token is routed to two.
MOE = {"moe_mode": "sparse", "num_experts": [4], "top_k_experts": 2}
TRAINED_OF_MOE = ["gate_proj", "up_proj", "down_proj", "wg"]


@cache
def model_of(size, tuning):
    """Return the model of a size without weights, in half precision, with what a stage trains."""
    import torch
    from transformers import CLIPVisionConfig

    from llava_lite.model import model_class_for
    from llava_lite.train.tuning import choose_what_trains

    model_class = model_class_for("llama")
    fields = {"mm_vision_tower": "clip", "vision_config": CLIPVisionConfig(**TOWER), "mm_hidden_size": 1024}
    fields |= {"mm_projector_type": "mlp2x_gelu", "moe": MOE if tuning == "moe" else None, "vocab_size": 32000}
    config = model_class.config_class(**SIZES[size], **fields)
    with torch.device("meta"):
        model = model_class(config).to(torch.bfloat16)
    flags = {"tuning": tuning, "freeze_mm_mlp_adapter": False, "unfreeze_mm_vision_tower": False}
    names = SimpleNamespace(train_modules=TRAINED_OF_MOE, freeze_backbone=False)
    return choose_what_trains(model, names, SimpleNamespace(**flags))


def table(head, rows):
    """Return a Markdown table."""
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def weights_table():
    """Return the numbers of weights of each size and stage, and the flops of a record."""
    from llava_lite.train.monitor.throughput import step_flops

    rows = []
    for size in SIZES:
        for stage, (tuning, _, work) in STAGES.items():
            model = model_of(size, tuning)
            weights = get_weights(model)
            flops = step_flops(model).of_batch(work.tokens, work.supervised, work.images)
            rows.append(
                [
                    size,
                    stage,
                    tuning,
                    f"{weights.all / 1e9:.2f}",
                    f"{weights.trained / 1e9:.3f}",
                    f"{flops / 1e12:.1f}",
                ]
            )
    return table(["size", "stage", "tuning", "weights, 10^9", "that train", "TFLOP a record"], rows)


def memory_table(cluster):
    """Return what a device holds at ZeRO-2 and ZeRO-3: weights, gradients and optimizer, then layers to checkpoint."""
    rows = []
    for size in SIZES:
        for stage, (tuning, _, work) in STAGES.items():
            model, micro = model_of(size, tuning), MICRO_BATCH[stage]
            for zero_stage in (2, 3):
                cells = []
                for num_devices in DEVICES:
                    fit = get_fit(model, work, zero_stage, on(cluster, num_devices), micro)
                    checkpointed = f"{fit.num_checkpointed} ckpt" if fit.fits else "too much"
                    cells.append(f"{fit.states / 2**30:.0f} + {fit.activations / 2**30:.0f}, {checkpointed}")
                rows.append([size, stage, micro, zero_stage, *cells])
    return table(["size", "stage", "micro-batch", "ZeRO", *DEVICES], rows)


def traffic_table():
    """Return the GB that a device sends in a step of one micro-batch."""
    rows = []
    for size in SIZES:
        for stage, (tuning, _, _) in STAGES.items():
            weights = get_weights(model_of(size, tuning))
            for zero_stage in (2, 3):
                sent = [sum(sent_bytes(weights, zero_stage, n).values()) / 1e9 for n in DEVICES]
                rows.append([size, stage, zero_stage, *(f"{gigabytes:.2f}" for gigabytes in sent)])
    return table(["size", "stage", "ZeRO", *DEVICES], rows)


def hours_table(cluster):
    """Return the hours of a pass with communication overlapped, and in brackets without overlap."""
    rows = []
    for size in SIZES:
        for stage, (tuning, zero_stage, work) in STAGES.items():
            cells = []
            for num_devices in DEVICES:
                here = on(cluster, num_devices)
                step = get_step(model_of(size, tuning), work, zero_stage, here, MICRO_BATCH[stage])
                best, worst = get_hours(step, work)
                larger = f", batch {step.global_batch}" if step.global_batch != work.global_batch else ""
                cells.append(f"{best:.2f} ({worst:.2f}){larger}")
            rows.append([size, stage, zero_stage, *cells])
    return table(["size", "stage", "ZeRO", *DEVICES], rows)


def tables(cluster=None):
    """Return the tables of the page by the name of their tag."""
    cluster = Cluster() if cluster is None else cluster
    return {
        "weights": weights_table(),
        "memory": memory_table(cluster),
        "traffic": traffic_table(),
        "hours": hours_table(cluster),
    }


def filled(page, parts):
    """Return the text of the page with each table between its tags."""
    for name, part in parts.items():
        tagged = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        if not re.search(tagged, page, flags=re.DOTALL):
            raise ValueError(
                f"the page has no place for the table {name!r}: expected <!-- {name} --> ... <!-- end -->."
            )
        page = re.sub(tagged, lambda found, part=part: f"{found[1]}{part}\n{found[2]}", page, flags=re.DOTALL)
    return page


def main(argv=None):
    """Write the tables into the page; flags change what the reader knows better."""
    import argparse

    base = Cluster()
    parser = argparse.ArgumentParser(description="Make the tables of docs/scaling.md for other devices and links.")
    parser.add_argument("--mfu", type=float, default=base.mfu)
    parser.add_argument("--peak_tflops", type=float, default=base.peak_flops / 1e12)
    parser.add_argument("--memory_gib", type=float, default=base.memory_bytes / 2**30)
    parser.add_argument("--node_gb_s", type=float, default=base.node_bandwidth / 1e9, help="a device to its node")
    parser.add_argument("--network_gb_s", type=float, default=base.network_bandwidth / 1e9, help="a device out of it")
    parser.add_argument("--write", action="store_true", help="into the page, in place of printing them")
    flags = parser.parse_args(argv)
    cluster = Cluster(
        peak_flops=flags.peak_tflops * 1e12,
        mfu=flags.mfu,
        memory_bytes=flags.memory_gib * 2**30,
        node_bandwidth=flags.node_gb_s * 1e9,
        network_bandwidth=flags.network_gb_s * 1e9,
    )
    if flags.write:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables(cluster)), encoding="utf-8")
    else:
        print("\n\n".join(f"{name}:\n{part}" for name, part in tables(cluster).items()))


if __name__ == "__main__":
    main()
