"""Step through the original LLaVA's own code, with its published flags, where a user has it.

The package `llava` (LLaVA 1.2.2) and the transformers 4.37 that it needs come from the directories that `--llava` and
`--python-path` of benchmarks.training name. Model, tower and splice are its own; weights, padded batches and the fused
AdamW are those of every rival. Its scripts train with gradient checkpointing, so that is on.
"""

from __future__ import annotations

import tempfile

import torch

from benchmarks.rivals import Step, choose_what_trains, make_optimizer
from benchmarks.workload import IMAGE, Size, fill, padded


def original_model(size: Size, directory: str):
    """Return LLaVA's own model with the seeded weights, in training mode; its tower is opened from `directory`."""
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    CLIPVisionModel(CLIPVisionConfig(**size.vision_config())).save_pretrained(directory)
    CLIPImageProcessor(size=size.image_size, crop_size=size.image_size).save_pretrained(directory)
    config = LlavaConfig(
        **size.text_config(),
        mm_vision_tower=directory,
        mm_hidden_size=size.vision_width,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        use_mm_proj=True,
        tokenizer_padding_side="right",
        tokenizer_model_max_length=2048,
        use_cache=False,
    )
    model = LlavaLlamaForCausalLM(config)
    model.get_vision_tower().load_model()
    fill(dict(model.named_parameters()))
    return model.train()


def with_one_placeholder_per_image(example: dict) -> dict:
    """Return an example as LLaVA's dataset makes it: its model replaces one placeholder per image by the features."""
    ids = example["input_ids"]
    kept = (ids != IMAGE) | (ids.roll(1) != IMAGE)
    return example | {"input_ids": ids[kept], "labels": example["labels"][kept]}


def original_loop(size, stage, schedule, options, on_step):
    """Step through LLaVA's own model; options: checkpointing (default: on)."""
    with tempfile.TemporaryDirectory() as directory:
        model = original_model(size, directory)
    parameters = choose_what_trains(model, stage)
    if options.get("checkpointing", True):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    optimizer = make_optimizer(parameters, size)
    on_step(None)
    for examples in schedule:
        batch = padded([with_one_placeholder_per_image(example) for example in examples])
        images = batch.pop("pixel_values")
        loss = model(**batch, images=images).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_step(Step(loss.item(), norm.item()))
