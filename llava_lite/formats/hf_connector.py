"""Turn the connector of transformers' LLaVA, two linear layers and an activation, into each of ours and back."""

from collections.abc import Mapping

import torch


def connector_from(projector: Mapping, kind: str) -> dict[str, torch.Tensor]:
    """Return our connector of the two layers; without an activation they are one matrix."""
    place = "model.mm_projector."
    layers = [layer for layer in ("linear_1", "linear_2") if (layer, "weight") in projector]
    weights = {layer: projector[layer, "weight"] for layer in layers}
    # multimodal_projector_bias False leaves them out.
    biases = {name: projector.get((name, "bias"), w.new_zeros(w.shape[0])) for name, w in weights.items()}
    if kind == "mlp2x_gelu" or len(layers) < 2:
        numbers = {"linear_1": 0, "linear_2": 2}
        named = {f"{place}{numbers[name]}.weight": weights[name] for name in layers}
        return named | {f"{place}{numbers[name]}.bias": biases[name] for name in layers}
    if kind == "identity":
        return {}
    first, second = weights["linear_1"], weights["linear_2"]
    if _is_identity(second) and not biases["linear_2"].any():
        return {f"{place}weight": first, f"{place}bias": biases["linear_1"]}
    bias = second.float() @ biases["linear_1"].float() + biases["linear_2"].float()
    return {f"{place}weight": (second.float() @ first.float()).to(first.dtype), f"{place}bias": bias.to(first.dtype)}


def _is_identity(weight: torch.Tensor) -> bool:
    return torch.equal(weight, torch.eye(*weight.shape, dtype=weight.dtype, device=weight.device))


def connector_to(projector: Mapping, config: Mapping, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the two layers of our connector; one that is missing passes features on."""
    if config["mm_projector_type"] == "mlp2x_gelu":
        names = {"0": "linear_1", "2": "linear_2"}
        return {f"{names[name[0]]}{name[1:]}": tensor for name, tensor in projector.items()}
    width = config["hidden_size"]
    same = {"weight": torch.eye(width, dtype=like.dtype), "bias": torch.zeros(width, dtype=like.dtype)}
    first = projector or same
    # Tensors of a file of their own each: safetensors refuses shared memory.
    layers = {"linear_1": first, "linear_2": {name: tensor.clone() for name, tensor in same.items()}}
    return {f"{layer}.{name}": tensor for layer, weights in layers.items() for name, tensor in weights.items()}
