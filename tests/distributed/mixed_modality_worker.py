"""One rank: train toys whose ranks see images and text at random; write each step's loss as JSON.

Run by test_mixed_modality.py with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment.
"""

import argparse
import json
import os
import random
from pathlib import Path

import torch

# SGD: Adam would blow rounding in gradients that are zero by symmetry (key biases) up to full steps.
NUM_STEPS = 6
IMAGE = -200
MOE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [4], "top_k_experts": 2, "router_aux_loss_coef": 0.01}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


# Four grids of crops, with 2 to 5 crops and 9 to 24 features an image of 2 x 2 patches.
SIZES = [(16, 40), (40, 16), (30, 30), (90, 20), (1, 300)]


def build_model(moe: bool, anyres: bool):
    """Return a seeded two-layer model; tower, connector, newline and decoder all train."""
    from llava_lite.model import LlavaConfig, LlavaLlamaForCausalLM

    torch.manual_seed(0)
    config = LlavaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        vision_config=dict(VISION),
        mm_projector_type="mlp2x_gelu",
        moe=MOE if moe else None,
        image_aspect_ratio="anyres" if anyres else "square",
        mm_patch_merge_type="spatial_unpad" if anyres else "flat",
    )
    return LlavaLlamaForCausalLM(config).train()


def batch_of(step: int, rank: int, seed: int, anyres: bool) -> dict:
    """Return this rank's micro-batch: all images, all text, or both, drawn at random."""
    rng = random.Random(f"{seed}/{step}/{rank}")
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    rows = rng.randint(1, 3)
    ids = torch.randint(3, 60, (rows, 8), generator=generator)
    kind = rng.choice(["images", "text", "both"])
    with_image = [kind == "images" or (kind == "both" and rng.random() < 0.5) for _ in range(rows)]
    for row, has in enumerate(with_image):
        if has:
            ids[row, rng.randint(1, 4)] = IMAGE
    labels = ids.masked_fill(ids == IMAGE, -100)
    labels[:, :3] = -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    if any(with_image):
        batch["images"] = torch.randn(sum(with_image), 3, 16, 16, generator=generator)
    if any(with_image) and anyres:
        batch["image_sizes"] = [rng.choice(SIZES) for _ in batch["images"]]
        batch["images"] = [
            torch.randn(num_crops(size), 3, 16, 16, generator=generator) for size in batch["image_sizes"]
        ]
    return batch


def num_crops(size) -> int:
    """Return the crops of an image of (width, height), the full one included."""
    from llava_lite.media.anyres import default_pinpoints, get_anyres_image_grid_shape

    columns, rows = get_anyres_image_grid_shape(size, default_pinpoints(16), 16)
    return 1 + columns * rows


def num_supervised(step: int, world: int, seed: int, anyres: bool) -> int:
    """Return the supervised tokens of a step over all ranks."""
    return sum(int((batch_of(step, rank, seed, anyres)["labels"] != -100).sum()) for rank in range(world))


def answer(model) -> list[int]:
    """Return a model's greedy answer about an image, the same on every rank."""
    size = SIZES[1]
    pixels = torch.randn(1, num_crops(size), 3, 16, 16, generator=torch.Generator().manual_seed(9))
    ids = torch.tensor([[1, IMAGE, 7, 8]])
    tokens = model.generate(ids, images=pixels, image_sizes=[size], max_new_tokens=6, do_sample=False, eos_token_id=63)
    return tokens[0].tolist()


def reference(moe: bool, world: int, seed: int, anyres: bool) -> tuple[list[float], list[int]]:
    """Return the cross-entropy of each step, and an answer, when one process runs all ranks' batches."""
    model = build_model(moe, anyres)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(NUM_STEPS):
        total = 0.0
        for rank in range(world):
            supervised = num_supervised(step, world, seed, anyres)
            out = model(**batch_of(step, rank, seed, anyres), num_items_in_batch=supervised)
            balance = 0 if out.moe_loss is None else out.moe_loss / world
            (out.lm_loss + balance).backward()
            total += float(out.lm_loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, answer(model)


def train(
    moe: bool, stage: int, seed: int, checkpointing: bool, anyres: bool, without_dummy: bool
) -> tuple[list[float], list[int]]:
    """Return the cross-entropy of each step, summed over ranks, and an answer, under DeepSpeed."""
    import deepspeed
    import torch.distributed as dist

    world, rank = dist.get_world_size(), dist.get_rank()
    model = build_model(moe, anyres)
    if without_dummy:
        type(model).needs_dummy = lambda self: False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    zero = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "leaf_module": {"classes": ["MoeBlock"]}}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,
        },
    )
    losses = []
    for step in range(NUM_STEPS):
        supervised = num_supervised(step, world, seed, anyres)
        out = engine(**batch_of(step, rank, seed, anyres), num_items_in_batch=supervised)
        balance = 0 if out.moe_loss is None else out.moe_loss
        # The engine averages gradients over ranks; the sum over ranks is meant.
        engine.backward(out.lm_loss * world + balance)
        engine.step()
        total = out.lm_loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total))
    tokens = answer(model)
    engine.destroy()
    return losses, tokens


def main():
    """Run every case that the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=json.loads, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--without_dummy", action="store_true")
    args = parser.parse_args()
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    results = []
    for case in args.cases:
        losses, tokens = train(**case, without_dummy=args.without_dummy)
        expected = reference(case["moe"], int(os.environ["WORLD_SIZE"]), case["seed"], case["anyres"])
        found = {"losses": losses, "tokens": tokens}
        results.append({"case": case, **found, "expected": dict(zip(found, expected, strict=True))})
    if int(os.environ["RANK"]) == 0:
        args.out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
