"""Read LLaVA's checkpoints: older model types, PEFT's prefixes in weight names, the shape of the vision tower.

LLaVA (https://github.com/haotian-liu/LLaVA) and this package use the same names, so there is little to rename.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import CLIPVisionConfig

PREFIX = "vision_tower.vision_model."
# LLaVA v1 and the first v1.5 are "llava", as is transformers' own LLaVA; LLaVA-NeXT's Qwen is a Qwen2.
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
    """Return the weights under our names, which are LLaVA's without PEFT's prefixes and infixes.

    `non_lora_trainables.bin` has base_model.model.model.mm_projector for model.mm_projector, and
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
    patches, (num_positions, _) = (shapes[f"embeddings.{part}_embedding.weight"] for part in ("patch", "position"))
    inner, _ = shapes["encoder.layers.0.mlp.fc1.weight"]
    num_layers = 1 + max(int(k.split(".")[2]) for k in shapes if k.startswith("encoder.layers."))
    return CLIPVisionConfig(**clip_vision_fields(patches, num_positions, inner, num_layers))


def clip_vision_fields(patches: tuple[int, ...], num_positions: int, inner: int, num_layers: int) -> dict:
    """Return the fields of OpenAI's CLIPVisionConfig. patches: shape of the convolution; inner: width of an MLP."""
    width, channels, patch, _ = patches
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": num_layers,
        "num_attention_heads": max(width // 64, 1),
        "num_channels": channels,
        "patch_size": patch,
        "image_size": patch * round((num_positions - 1) ** 0.5),
        "hidden_act": "quick_gelu",
    }
