"""Turn a model and the tokens of a micro-batch into the bytes of one device.

Letters: D model width, I width of an MLP, K experts a token (1 in a dense layer), S supervised positions,
V vocabulary, s bytes of a number.
"""

from dataclasses import dataclass

import numpy as np
from torch import nn

from llava_lite.model.lm_head import CHUNK_LOGITS
from llava_lite.model.moe.block import MoeBlock
from llava_lite.train.tuning import compute_dtype, count, get_part

GIB = 2**30
# Adam keeps two float32 tensors of the size of the weights, four bytes each.
ADAM_BYTES = 8
MASTER_BYTES = 4
# Weights that ZeRO-3 has on the device at once with offload_param: stage3_max_live_parameters of the JSONs.
LIVE_WEIGHTS = 1e9


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. Not in it: the device's own context, communication buckets, fragmentation, the tower."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float

    @property
    def total(self):
        """Return the sum."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


def weight_bytes(model, zero_stage, num_ranks, ep_size=1):
    """Return bytes of weights, gradients and optimizer state on one rank (Rajbhandari et al. 2020, ZeRO, section 3).

    Adam keeps 8 bytes a trained weight, and 4 more for the float32 copy of a half-precision one. ZeRO-1 splits the
    optimizer over the ranks, ZeRO-2 the gradients too, ZeRO-3 the weights too, frozen ones included. With `ep_size`
    each rank holds a fraction of the experts' weights; what ZeRO splits is as small without it.
    """
    weights = gradients = optimizer = 0
    for name, param in model.named_parameters():
        size = param.element_size()
        weights += count(param) * size / (ep_size if zero_stage < 3 and get_part(name) == "experts" else 1)
        if param.requires_grad:
            gradients += count(param) * size
            optimizer += count(param) * (ADAM_BYTES + (MASTER_BYTES if size < 4 else 0))
    return (
        weights / (num_ranks if zero_stage >= 3 else 1),
        gradients / (num_ranks if zero_stage >= 2 else 1),
        optimizer / (num_ranks if zero_stage >= 1 else 1),
    )


def layer_activation_bytes(layer, config, dtype_bytes):
    """Return the bytes a token that a decoder layer saves for its backward pass.

    | tensor | width | times, frozen / trained |
    | input of each norm, output of each norm | D | see `norm_widths` |
    | queries | heads x head width | 1 / 1 |
    | output of the attention | heads x head width | 1 (SDPA) / 2 (SDPA and o_proj) |
    | keys, values | key-value heads x head width | 1 each / 1 each |
    | MLP | D and I | see `mlp_widths` |

    Counted with saved-tensor hooks on torch 2.13 and transformers 5.23.
    """
    trains = any(param.requires_grad for param in layer.parameters())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = head_dim * config.num_attention_heads, head_dim * config.num_key_value_heads
    norms = [m for m in layer.children() if "norm" in type(m).__name__.lower()]
    kept = sum(norm_widths(norm, trains, dtype_bytes) for norm in norms) * config.hidden_size
    kept += (3 if trains else 2) * queries + 2 * keys
    if hasattr(layer.self_attn, "q_norm"):
        # An RMSNorm of each head: its input, normalised where its weight trains, and in half precision float32.
        kept += (1 + trains + (dtype_bytes < 4)) * (queries + keys)
    of_hidden, of_inner = mlp_widths(layer, trains, dtype_bytes)
    return dtype_bytes * (kept + of_hidden * config.hidden_size + of_inner * config.intermediate_size)


def norm_widths(norm, trains, dtype_bytes):
    """Return how many tensors [.., D] a norm saves for the backward pass.

    LayerNorm: its input, and its output for the weights after it. Hugging Face's RMSNorm also saves the normalised
    activations before the weight, and in half precision their float32.
    """
    if isinstance(norm, nn.LayerNorm):
        return 2 if trains else 1
    return (2.5 if trains else 1) + (dtype_bytes < 4)


def mlp_widths(layer, trains, dtype_bytes):
    """Return how many tensors [.., D] and [.., I] a token saves in an MLP, or in the experts that it is routed to.

    | MLP | [.., D] | [.., I] |
    | gated | 0 | gate, up, activated gate; gate times up where weights train |
    | Phi's | 0 | input, output and three steps of the activation; one more where weights train |
    | experts | trained: 2 in half precision (the router's float32 input), else 0; frozen: 1 | gate and up, K times |
    """
    if isinstance(layer.mlp, MoeBlock):
        top_k = layer.mlp.moe.top_k_experts
        return 2 * (dtype_bytes < 4) if trains else 1, top_k * (2 if layer.mlp.experts.shape.gated else 1)
    if hasattr(layer.mlp, "gate_proj"):
        return 0, 3 + trains
    return 0, 4 + trains


def activation_bytes(model, num_tokens, dtype_bytes, num_checkpointed=0):
    """Return the bytes of activations of a micro-batch, with this many layers checkpointed, evenly spread.

    A checkpointed layer saves its input only. Peak is saved activations plus one recomputed layer if every layer is
    checkpointed; else a later layer that is not checkpointed has freed as much by then.
    """
    layers, config = model.get_model().layers, model.config
    per_layer = [layer_activation_bytes(layer, config, dtype_bytes) for layer in layers]
    chosen = spread_layers(len(layers), num_checkpointed)
    kept = sum(dtype_bytes * config.hidden_size if i in chosen else size for i, size in enumerate(per_layer))
    return num_tokens * (kept + (max(per_layer) if num_checkpointed == len(layers) else 0))


def spread_layers(num_layers, num_chosen):
    """Return the numbers of `num_chosen` evenly spaced layers, the last one only if all are chosen."""
    return {k * num_layers // num_chosen for k in range(num_chosen)}


def loss_bytes(model, num_supervised, dtype_bytes, device_type="cuda"):
    """Return the bytes of the loss: logits of one chunk, as computed and twice in float32, and gradients [S, D].

    With --plain_paths loss S is all positions, and all logits exist at once, with both their gradients.
    """
    head, width = model.get_output_embeddings(), model.config.hidden_size
    if "loss" in getattr(head, "plain_paths", ("loss",)):
        return num_supervised * model.config.vocab_size * 2 * (dtype_bytes + 4)
    chunk = min(num_supervised * model.config.vocab_size, CHUNK_LOGITS.get(device_type, CHUNK_LOGITS["cuda"]))
    return chunk * (dtype_bytes + 8) + num_supervised * width * dtype_bytes


def longest_batch(dataset, training_args):
    """Return the tokens of the longest micro-batch that can be drawn: packed, or padded to its longest record.

    For shards, whose lengths are unknown, the longest that is allowed.
    """
    args, size = training_args, training_args.per_device_train_batch_size
    if args.packing == "tokens":
        return args.packing_tokens
    lengths = getattr(dataset, "lengths", None)
    if lengths is None:
        return size * args.model_max_length
    if args.packing == "samples":
        return int(np.sort(np.asarray(lengths))[-size:].sum())
    return size * int(np.max(lengths))


def offloaded(deepspeed_config):
    """Return which of "optimizer" and "param" a DeepSpeed config (a dict) offloads."""
    zero = deepspeed_config.get("zero_optimization") or {}
    devices = {name: (zero.get(f"offload_{name}") or {}).get("device") for name in ("optimizer", "param")}
    return {name for name, device in devices.items() if device not in (None, "none")}


def get_offload(training_args):
    """Return what a run offloads from its device; nothing on a CPU, where that changes nothing."""
    if training_args.device.type == "cpu" or not training_args.uses_deepspeed:
        return set()
    return offloaded(training_args.deepspeed_plugin.deepspeed_config)


def estimate_memory(
    model,
    training_args,
    num_tokens,
    num_supervised,
    num_checkpointed=0,
    num_ranks=None,
    offload=frozenset(),
    ep_size=1,
    device_type="cuda",
):
    """Return the Memory of one rank for micro-batches of `num_tokens`, `num_supervised` of them supervised.

    num_checkpointed: decoder layers that are recomputed. num_ranks: default the run's. offload: see `offloaded`;
    gradients are offloaded with the optimizer, and the weights in use stay. ep_size: see `weight_bytes`.
    """
    dtype_bytes = compute_dtype(training_args).itemsize
    num_ranks = training_args.world_size if num_ranks is None else num_ranks
    weights, gradients, optimizer = weight_bytes(model, training_args.zero_stage, num_ranks, ep_size)
    num_positions = num_tokens if "loss" in model.plain_paths else num_supervised
    return Memory(
        weights=min(weights, LIVE_WEIGHTS * dtype_bytes) if "param" in offload else weights,
        gradients=0 if "optimizer" in offload else gradients,
        optimizer=0 if "optimizer" in offload else optimizer,
        activations=activation_bytes(model, num_tokens, dtype_bytes, num_checkpointed),
        loss=loss_bytes(model, num_positions, dtype_bytes, device_type),
    )


def memory_lines(memory):
    """Return the lines of the table of one rank's memory."""
    rows = [*((name, getattr(memory, name)) for name in memory.__dataclass_fields__), ("total", memory.total)]
    return [
        f"{name:<14}{value / GIB:>10.3f} GiB" if memory.total > GIB else f"{name:<14}{value / 2**20:>10.1f} MiB"
        for name, value in rows
    ]


def gib(num_bytes):
    """Return bytes as text in GiB."""
    return f"{num_bytes / GIB:,.2f} GiB"
