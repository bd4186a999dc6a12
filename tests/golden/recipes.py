"""The recipes whose trajectories are kept, and the variants of each that must take the same one."""

from typing import NamedTuple

NUM_STEPS = 30
# Steps of a variant: enough for two epochs of the data.
NUM_VARIANT_STEPS = 12
# Batches of four of the 24 records of the toy data.
COMMON = "--logging_steps 1 --weight_decay 0 --data_seed 3"
ANYRES = "--image_aspect_ratio anyres --mm_patch_merge_type spatial_unpad"

# What sets off no other arithmetic than that of the recipe itself, but for the order of sums.
SAME = {
    "padded": "--packing none",
    "padded, eager attention": "--packing none --attn_implementation eager",
    "padded, SDPA": "--packing none --attn_implementation sdpa",
    "all logits": "--plain_paths loss",
    "plain matmul": "--plain_paths matmul",
    "two workers": "--dataloader_num_workers 2",
    "cached features": "--feature_cache FEATURES",
    "checkpointing": "--gradient_checkpointing True",
}
ACCUMULATED = {"accumulated": "--per_device_train_batch_size 2 --gradient_accumulation_steps 2"}


class Recipe(NamedTuple):
    """A stage of tests/train/conftest.py with more flags, and the variants by name: flags that change no number."""

    stage: str
    flags: str
    variants: dict[str, str]
    ranks: bool = False  # whether 2 ranks with half the batch under ZeRO-2 and ZeRO-3 are variants too


RECIPES = {
    "pretrain": Recipe("projector", "", {**SAME, **ACCUMULATED}, ranks=True),
    "finetune": Recipe("full", "", {**SAME, **ACCUMULATED}, ranks=True),
    "finetune_lora": Recipe(
        "lora", "--lora_dropout 0", {name: SAME[name] for name in ("padded", "all logits")} | ACCUMULATED
    ),
    # Its balance loss is a mean over micro-batches, so that accumulation is another loss.
    "moe": Recipe("moe", "", {"padded": SAME["padded"], "plain experts": "--plain_paths experts matmul"}),
    "tower": Recipe("full", f"--unfreeze_mm_vision_tower True {ANYRES}", {"padded": SAME["padded"]} | ACCUMULATED),
    "packs": Recipe(
        "full",
        "--packing tokens --packing_tokens 200 --per_device_train_batch_size 1",
        {"all logits": SAME["all logits"], "two workers": SAME["two workers"]},
    ),
    "grouped": Recipe("full", "--group_by_modality_length True", {"padded": SAME["padded"]}),
    "prompts": Recipe(
        "full",
        "--tuning prompts --mm_injection adaption_prompt --mm_vision_select_feature pooled --adaption_prompt_len 1",
        {"padded": SAME["padded"]} | ACCUMULATED,
    ),
    "new_words": Recipe("full", "--new_tokens <loc> curious --mm_use_im_start_end True", {"padded": SAME["padded"]}),
}
