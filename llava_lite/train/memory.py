"""Turn a model and the tokens of a micro-batch into the bytes of one device, and into how many layers to checkpoint.

Letters: D model width, I width of an MLP, K experts that a token visits (1 in a dense layer), S supervised positions,
V vocabulary, s bytes of a number.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from llava_lite.model.moe import MoeBlock
from llava_lite.model.vocabulary_head import CHUNK_LOGITS
from llava_lite.train.ranks import everyone
from llava_lite.train.tuning import compute_dtype, count, part_of

logger = logging.getLogger(__name__)

GIB = 2**30
# Of two float32 tensors of the size of the weights that Adam keeps, four bytes each.
ADAM_BYTES = 8
MASTER_BYTES = 4
# Weights that ZeRO-3 has on the device at once where they live elsewhere: stage3_max_live_parameters of the JSONs.
LIVE_WEIGHTS = 1e9
# Of what is free on the device, what a plan may fill: the rest is for what Memory does not count. The CPU's memory
# belongs to loader workers and to other programs too.
USABLE_SHARE = {"cuda": 0.88, "cpu": 0.6}


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
    optimizer over the ranks, ZeRO-2 the gradients too, ZeRO-3 the weights too, frozen ones included. Where `ep_size`
    ranks share the experts, each holds its share of their weights; whatever ZeRO splits is as small without.
    """
    weights = gradients = optimizer = 0
    for name, param in model.named_parameters():
        size = param.element_size()
        weights += count(param) * size / (ep_size if zero_stage < 3 and part_of(name) == "experts" else 1)
        if param.requires_grad:
            gradients += count(param) * size
            optimizer += count(param) * (ADAM_BYTES + (MASTER_BYTES if size < 4 else 0))
    return (
        weights / (num_ranks if zero_stage >= 3 else 1),
        gradients / (num_ranks if zero_stage >= 2 else 1),
        optimizer / (num_ranks if zero_stage >= 1 else 1),
    )


def layer_activation_bytes(layer, config, dtype_bytes):
    """Return the bytes a token that a decoder layer keeps for its backward pass.

    Widths: D of each norm's input, and of its output where weights behind it train; heads x Dh of queries and of the
    attention's output, that twice where weights train (as SDPA and as o_proj have it); keys and values; of an MLP see
    `mlp_widths`. Counted with saved-tensor hooks on torch 2.13 and transformers 5.23.
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
    | gated | 0 | gate, up, activated gate; their product where weights train |
    | Phi's | 0 | input, output and three steps of the activation; one more where weights train |
    | experts | trained: 2 in half precision (the router's float32 input), else 0; frozen: 1 | gate and up, K times |
    """
    if isinstance(layer.mlp, MoeBlock):
        visits = layer.mlp.moe.top_k_experts
        return 2 * (dtype_bytes < 4) if trains else 1, visits * (2 if layer.mlp.experts.shape.gated else 1)
    if hasattr(layer.mlp, "gate_proj"):
        return 0, 3 + trains
    return 0, 4 + trains


def activation_bytes(model, num_tokens, dtype_bytes, num_checkpointed=0):
    """Return the bytes of activations of a micro-batch, with so many of its layers checkpointed, evenly spread.

    A checkpointed layer keeps its input alone. Recomputing one takes what it would have kept, but a later layer that
    is not checkpointed has freed as much by then; only where all are does that come on top.
    """
    layers, config = model.get_model().layers, model.config
    per_layer = [layer_activation_bytes(layer, config, dtype_bytes) for layer in layers]
    chosen = spread_layers(len(layers), num_checkpointed)
    kept = sum(dtype_bytes * config.hidden_size if i in chosen else size for i, size in enumerate(per_layer))
    return num_tokens * (kept + (max(per_layer) if num_checkpointed == len(layers) else 0))


def spread_layers(num_layers, num_chosen):
    """Return the numbers of `num_chosen` layers of a stack at even distances, the last only if all are."""
    return {k * num_layers // num_chosen for k in range(num_chosen)}


def loss_bytes(model, num_learned, dtype_bytes, device_type="cuda"):
    """Return the bytes of the loss: logits of one chunk, as computed and twice in float32, and gradients [S, D].

    With --plain_paths loss, whose S are all positions, all logits are there at once, with both their gradients.
    """
    head, width = model.get_output_embeddings(), model.config.hidden_size
    if "loss" in getattr(head, "plain_paths", ("loss",)):
        return num_learned * model.config.vocab_size * 2 * (dtype_bytes + 4)
    chunk = min(num_learned * model.config.vocab_size, CHUNK_LOGITS.get(device_type, CHUNK_LOGITS["cuda"]))
    return chunk * (dtype_bytes + 8) + num_learned * width * dtype_bytes


def longest_batch(dataset, training_args):
    """Return the tokens of the longest micro-batch that can be drawn: a row without padding, or padded to its longest.

    Of shards, whose lengths nobody knows, the longest that may be.
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
    """Return which of "optimizer" and "param" a DeepSpeed config (a dict) keeps off the device."""
    zero = deepspeed_config.get("zero_optimization") or {}
    devices = {name: (zero.get(f"offload_{name}") or {}).get("device") for name in ("optimizer", "param")}
    return {name for name, device in devices.items() if device not in (None, "none")}


def offload_of_run(training_args):
    """Return what a run keeps off its device, whoever gave DeepSpeed's config; on the CPU that is where it was."""
    if training_args.device.type == "cpu" or not training_args.uses_deepspeed:
        return set()
    return offloaded(training_args.deepspeed_plugin.deepspeed_config)


def estimate_memory(
    model,
    training_args,
    num_tokens,
    num_learned,
    num_checkpointed=None,
    num_ranks=None,
    offload=frozenset(),
    ep_size=1,
    device_type="cuda",
):
    """Return the Memory of one rank for micro-batches of `num_tokens`, `num_learned` of them supervised.

    num_checkpointed: layers; default: all or none, as --gradient_checkpointing says. num_ranks: default the run's.
    offload: see `offloaded`; gradients leave with the optimizer, and of the weights those in use stay. ep_size: see
    `weight_bytes`.
    """
    if num_checkpointed is None:
        num_checkpointed = len(model.get_model().layers) * bool(training_args.gradient_checkpointing)
    dtype_bytes = compute_dtype(training_args).itemsize
    num_ranks = training_args.world_size if num_ranks is None else num_ranks
    weights, gradients, optimizer = weight_bytes(model, training_args.zero_stage, num_ranks, ep_size)
    num_asked = num_tokens if "loss" in model.plain_paths else num_learned
    return Memory(
        weights=min(weights, LIVE_WEIGHTS * dtype_bytes) if "param" in offload else weights,
        gradients=0 if "optimizer" in offload else gradients,
        optimizer=0 if "optimizer" in offload else optimizer,
        activations=activation_bytes(model, num_tokens, dtype_bytes, num_checkpointed),
        loss=loss_bytes(model, num_asked, dtype_bytes, device_type),
    )


def memory_lines(memory):
    """Return the table of one rank's memory."""
    rows = [*((name, getattr(memory, name)) for name in memory.__dataclass_fields__), ("total", memory.total)]
    return [
        f"{name:<14}{value / GIB:>10.3f} GiB" if memory.total > GIB else f"{name:<14}{value / 2**20:>10.1f} MiB"
        for name, value in rows
    ]


# How many layers to checkpoint.


def fewest_checkpointed(num_layers, total_of, budget):
    """Return the least number of checkpointed layers with which `total_of(number)` is at most `budget`; else all."""
    return next((number for number in range(num_layers) if total_of(number) <= budget), num_layers)


def usable_bytes(device, num_local_ranks=1, held=0):
    """Return the bytes of a device that a rank may fill, those that it already holds included.

    held: bytes of its tensors on the CPU, counted there as taken.
    """
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return USABLE_SHARE["cuda"] * (free + torch.cuda.memory_reserved(device))
    return USABLE_SHARE["cpu"] * (free_ram() / num_local_ranks + held)


def free_ram(proc="/proc/meminfo", group="/sys/fs/cgroup"):
    """Return the bytes that this machine, or the container that this process is confined to, has left."""
    lines = dict(line.split(":") for line in Path(proc).read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (Path(group, f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return free
    # Files that were read count as used, and go when memory is asked for.
    stat = Path(group, "memory.stat")
    kinds = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
    reclaimable = int(kinds.get("inactive_file", 0))
    return free if limit == "max" else min(free, max(0, int(limit) - int(used) + reclaimable))


def checkpoint_layers(model, chosen):
    """Checkpoint the decoder layers with these numbers and no others; a tower that trains as a whole."""
    # transformers 5.17 knows the older name only, 5.23 warns of it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for number, layer in enumerate(model.get_model().layers):
        layer.gradient_checkpointing = number in chosen
    tower = model.get_vision_tower()
    if tower is not None and not any(param.requires_grad for param in tower.parameters()):
        for module in tower.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False


def choose_checkpointing(model, dataset, training_args, ep_size=1):
    """Checkpoint as few layers as the longest micro-batch leaves room for, equally many on every rank; say why.

    For --gradient_checkpointing auto. Returns the number of checkpointed layers.
    """
    args, num_layers = training_args, len(model.get_model().layers)
    num_tokens = longest_batch(dataset, args)
    where = {"offload": offload_of_run(args), "device_type": args.device.type}

    def memory_with(number):
        return estimate_memory(model, args, num_tokens, num_tokens, number, ep_size=ep_size, **where)

    held = sum(param.numel() * param.element_size() for param in model.parameters() if param.device.type == "cpu")
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    budget = min(everyone(usable_bytes(args.device, local_ranks, held)))
    chosen = fewest_checkpointed(num_layers, lambda number: memory_with(number).total, budget)
    none, needed = memory_with(0).total, memory_with(chosen).total
    logger.info(
        "--gradient_checkpointing auto: %d of %d layers. %s of %s (%d%% of what is free) are needed with %s tokens in "
        "a micro-batch, all supervised; %s without checkpointing.",
        *(chosen, num_layers, gib(needed), gib(budget), 100 * USABLE_SHARE.get(args.device.type, 0.88)),
        *(f"{num_tokens:,}", gib(none)),
    )
    if needed > budget:
        logger.warning(
            "that is more than there is: expect to run out of memory. Use smaller micro-batches with more "
            "--gradient_accumulation_steps, more ranks with zero3.json, or scripts/zero3_offload.json."
        )
    if chosen:
        checkpoint_layers(model, spread_layers(num_layers, chosen))
    return chosen


def gib(num_bytes):
    """Return bytes in words."""
    return f"{num_bytes / GIB:,.2f} GiB"
