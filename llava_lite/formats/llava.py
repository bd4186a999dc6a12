"""Read what LLaVA wrote: its older model types, the wrapping of PEFT in its files, the shape of the tower inside.

LLaVA (https://github.com/haotian-liu/LLaVA) and this package use the same names, so little is left to turn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from transformers import CLIPVisionConfig
from transformers.utils import cached_file

PREFIX = "vision_tower.vision_model."
# LLaVA v1 and the first v1.5 say "llava", as transformers' own LLaVA does; LLaVA-NeXT's Qwen is a Qwen2.
MODEL_TYPES = {"llava": "llava_llama", "llava_qwen": "llava_qwen2"}
# Fields that only transformers' LLaVA, MoE-LLaVA and Qwen's first generation have.
NOT_LLAVA = ("text_config", "mm_image_tower", "image_projector_type", "kv_channels")


def claims(config: Mapping) -> bool:
    """Tell a LLaVA checkpoint whose model_type is not the one used here."""
    return config.get("model_type") in MODEL_TYPES and not any(key in config for key in NOT_LLAVA)


def config_from(config: Mapping) -> dict:
    """Return the fields of our config: LLaVA's, with our model_type."""
    return {**config, "model_type": MODEL_TYPES.get(config["model_type"], config["model_type"])}


def weights_from(state_dict: Mapping, config: Mapping) -> dict:
    """Return the weights under our names, which are LLaVA's without what PEFT puts around them.

    `non_lora_trainables.bin` says base_model.model.model.mm_projector for model.mm_projector, and
    x.modules_to_save.default.weight for x.weight.
    """
    return {plain_name(name): tensor for name, tensor in state_dict.items()}


def plain_name(name: str) -> str:
    """Return a weight's name in the model that PEFT wraps."""
    name = name.removeprefix("base_model.model.").removeprefix("base_model.")
    if name.startswith(("model.model.", "model.lm_head.")):
        name = name.removeprefix("model.")
    # The matrix beside PEFT's trainable_token_indices, which it saves where the vocabulary has grown.
    name = name.replace(".token_adapter.base_layer.", ".")
    return name.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")


def clip_config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> CLIPVisionConfig:
    """Return the config of a CLIP tower from the shapes of its weights (names from `vision_tower.vision_model.` on).

    Heads are 64 wide and the activation is quick_gelu, as in every CLIP that OpenAI released.
    """
    shapes = {k[len(PREFIX) :]: tuple(v) for k, v in shapes.items() if k.startswith(PREFIX)}
    width, channels, patch, _ = shapes["embeddings.patch_embedding.weight"]
    num_positions, _ = shapes["embeddings.position_embedding.weight"]
    layers = {int(k.split(".")[2]) for k in shapes if k.startswith("encoder.layers.")}
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=max(width // 64, 1),
        num_channels=channels,
        patch_size=patch,
        image_size=patch * round((num_positions - 1) ** 0.5),
        hidden_act="quick_gelu",
    )


def read_shapes(path: str | Path, **hub) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of a checkpoint by name; of safetensors only the headers are read."""
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **hub)
    index = index or cached_file(
        path, "pytorch_model.bin.index.json", _raise_exceptions_for_missing_entries=False, **hub
    )
    if index:
        files = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = ["model.safetensors", "pytorch_model.bin"]
    shapes: dict[str, tuple[int, ...]] = {}
    for name in files:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)
        if file:
            shapes.update(shapes_of_file(file))
    return shapes


def shapes_of_file(file: str) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of one weights file."""
    if file.endswith(".safetensors"):
        from safetensors import safe_open

        with safe_open(file, framework="pt") as weights:
            return {k: tuple(weights.get_slice(k).get_shape()) for k in weights.keys()}  # noqa: SIM118
    import torch

    loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {k: tuple(v.shape) for k, v in loaded.items()}
