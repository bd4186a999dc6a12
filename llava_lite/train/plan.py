"""Estimate what a run needs of each device, from shapes alone: memory, tokens and optimizer steps.

Letters: D model width, I width of an MLP, K experts that a token visits (1 in a dense layer), s bytes of a number.
"""

import math
import os
from dataclasses import dataclass

import numpy as np
from torch import nn

from llava_lite.model.moe import MoeBlock
from llava_lite.train.tuning import choose_what_trains, compute_dtype, count, describe, loading_dtype

GIB = 2**30
# Of two float32 tensors of the size of the weights that Adam keeps, four bytes each.
ADAM_BYTES = 8
MASTER_BYTES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. Not in it: the device's own context, communication buckets, fragmentation."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self):
        """Return the sum."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def weight_bytes(model, zero_stage, num_ranks):
    """Return bytes of weights, gradients and optimizer state on one rank (Rajbhandari et al. 2020, ZeRO, section 3).

    Adam keeps 8 bytes a trained weight, and 4 more for the float32 copy of a half-precision one. ZeRO-1 splits the
    optimizer over the ranks, ZeRO-2 the gradients too, ZeRO-3 the weights too, frozen ones included.
    """
    weights = gradients = optimizer = 0
    for param in model.parameters():
        size = param.element_size()
        weights += count(param) * size
        if param.requires_grad:
            gradients += count(param) * size
            optimizer += count(param) * (ADAM_BYTES + (MASTER_BYTES if size < 4 else 0))
    return (
        weights / (num_ranks if zero_stage >= 3 else 1),
        gradients / (num_ranks if zero_stage >= 2 else 1),
        optimizer / (num_ranks if zero_stage >= 1 else 1),
    )


def layer_activation_bytes(layer, config, dtype_bytes):
    """Return the bytes a token that a stock decoder layer keeps for its backward pass.

    s * (n D + 2 kv + m I K + e K D): n = 3 + 2.5 an RMSNorm + 2 a LayerNorm with trained weights, 2 + 1 a norm with
    frozen ones (which need no input), 1 more an RMSNorm in half precision, for its float32; kv the width of keys;
    m = 4 or 3 in a gated MLP (input, gate, up, product), 5 or 4 in Phi's; e = 3 or 2 in a layer with experts, 1
    more in half precision. Counted with saved-tensor hooks on transformers 5.23.
    """
    trains = any(param.requires_grad for param in layer.parameters())
    block = layer.mlp if isinstance(layer.mlp, MoeBlock) else None
    visits = 0 if block is None else block.moe.top_k_experts
    is_gated = hasattr(layer.mlp, "gate_proj") if block is None else block.experts.shape.gated
    norms = [m for m in layer.children() if "norm" in type(m).__name__.lower()]
    num_rms = sum(not isinstance(norm, nn.LayerNorm) for norm in norms)
    of_norms = 2 * len(norms) + 0.5 * num_rms if trains else len(norms)
    is_half = dtype_bytes < 4
    width = (3 if trains else 2) + of_norms + is_half * num_rms + visits * ((3 if trains else 2) + is_half)
    inner = config.intermediate_size * max(visits, 1) * ((4 if trains else 3) + (0 if is_gated else 1))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return dtype_bytes * (width * config.hidden_size + inner + 2 * head_dim * config.num_key_value_heads)


def activation_bytes(model, num_tokens, dtype_bytes, checkpointing):
    """Return the bytes of activations of a micro-batch; with gradient checkpointing a layer keeps only its input."""
    layers, config = model.get_model().layers, model.config
    per_layer = [layer_activation_bytes(layer, config, dtype_bytes) for layer in layers]
    if not checkpointing:
        return num_tokens * sum(per_layer)
    return num_tokens * (max(per_layer) + len(layers) * dtype_bytes * config.hidden_size)


def logits_bytes(config, num_learned, dtype_bytes):
    """Return the bytes of logits at the learned positions: as computed, in float32, and both gradients."""
    return num_learned * config.vocab_size * 2 * (dtype_bytes + 4)


def estimate_memory(model, training_args, num_tokens, num_learned):
    """Return the Memory of one rank for micro-batches of `num_tokens`, `num_learned` of them supervised."""
    dtype_bytes = compute_dtype(training_args).itemsize
    weights, gradients, optimizer = weight_bytes(model, training_args.zero_stage, training_args.world_size)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activation_bytes(model, num_tokens, dtype_bytes, training_args.gradient_checkpointing),
        logits=logits_bytes(model.config, num_learned, dtype_bytes),
    )


def longest_batch(lengths, batch_size):
    """Return the tokens of the longest batch that can be drawn, padding included."""
    return batch_size * int(np.max(lengths))


def memory_lines(memory):
    """Return the table of one rank's memory."""
    rows = [*((name, getattr(memory, name)) for name in memory.__dataclass_fields__), ("total", memory.total)]
    return [
        f"{name:<14}{value / GIB:>10.3f} GiB" if memory.total > GIB else f"{name:<14}{value / 2**20:>10.1f} MiB"
        for name, value in rows
    ]


def plan_of_run(model, dataset, training_args):
    """Return the lines that a run prints before it starts: batch, steps, memory a rank in its longest batch."""
    args = training_args
    batch = args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
    num_steps = steps_of_run(len(dataset), batch, args)
    num_tokens = longest_batch(dataset.lengths, args.per_device_train_batch_size)
    learned_share = dataset.annotations.token_facts().num_learned.sum() / max(dataset.lengths.sum(), 1)
    memory = estimate_memory(model, args, num_tokens, num_tokens * learned_share)
    head = [
        f"{args.world_size} ranks x {args.per_device_train_batch_size} records x {args.gradient_accumulation_steps} "
        f"accumulated = {batch} a step, {num_steps:,} steps, ZeRO-{args.zero_stage}",
        f"estimated memory of a rank in its longest batch ({num_tokens:,} tokens):",
    ]
    tail = []
    if dataset.layout.is_anyres:
        tail = [picture_line(dataset.layout, args.model_max_length)]
    return "\n".join(head + memory_lines(memory) + tail)


def picture_line(layout, max_length):
    """Return the line that says how long pictures are, and whether the longest fits."""
    least = layout.num_tokens() if not layout.is_anyres else layout.num_features
    length = f"{layout.most_tokens:,}" if least == layout.most_tokens else f"up to {layout.most_tokens:,}"
    line = f"a picture is {length} tokens"
    if layout.most_tokens < max_length:
        return line
    return f"{line}: more than --model_max_length {max_length:,} has room for; records with such a picture are refused"


def steps_of_run(num_records, batch, args):
    """Return the number of optimizer steps."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(math.ceil(num_records / batch) * args.num_train_epochs)


def empty_model(model_args, data_args, training_args):
    """Return the model of a run without weights: only configs are read, so that a laptop can plan for a cluster."""
    import torch

    from llava_lite.companions import refuse_missing_model
    from llava_lite.model import model_class_for
    from llava_lite.model.assemble import text_fields, tower_fields
    from llava_lite.model.builder import config_of

    refuse_missing_model(model_args.model_name_or_path)
    stock = config_of(model_args.model_name_or_path, {"cache_dir": training_args.cache_dir})
    model_class = model_class_for(stock.model_type)
    config = stock
    if not stock.model_type.startswith("llava_"):
        fields = text_fields(stock) | tower_fields(model_args.vision_tower)
        config = model_class.config_class(**fields)
    for key, value in (model_args.config_choices() | data_args.config_choices()).items():
        setattr(config, key, value)
    if training_args.tuning == "moe":
        config.moe = model_args.moe_config()
    with torch.device("meta"):
        model = model_class(config).to(loading_dtype(training_args))
    return choose_what_trains(model, model_args, training_args)


def main(argv=None):
    """Print the plan of a run: the flags of `llava-lite train`, and --num_devices N. Reads configs, no weights."""
    import argparse
    import sys

    from llava_lite.arguments import parse_args

    argv = list(sys.argv[1:] if argv is None else argv)
    own = argparse.ArgumentParser(prog="llava-lite plan", add_help=False, allow_abbrev=False)
    own.add_argument("--num_devices", "--num-devices", type=int, default=1, metavar="N", help="ranks (default: 1)")
    options, flags = own.parse_known_args(argv)
    num_devices = options.num_devices
    if {"-h", "--help"} & set(flags):
        print(f"{own.format_help()}\nand the flags of `llava-lite train`, which follow.\n")
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    model_args, data_args, training_args = parse_args(flags)
    model = empty_model(model_args, data_args, training_args)
    print(describe(model, training_args))
    num_tokens = training_args.per_device_train_batch_size * training_args.model_max_length
    weights, gradients, optimizer = weight_bytes(model, training_args.zero_stage, num_devices)
    dtype_bytes = compute_dtype(training_args).itemsize
    memory = Memory(
        weights,
        gradients,
        optimizer,
        activation_bytes(model, num_tokens, dtype_bytes, training_args.gradient_checkpointing),
        logits_bytes(model.config, num_tokens, dtype_bytes),
    )
    print(
        f"\n{num_devices} devices, ZeRO-{training_args.zero_stage}, {num_tokens:,} tokens in a micro-batch "
        f"({training_args.per_device_train_batch_size} records of {training_args.model_max_length}, all learned):"
    )
    print("\n".join(memory_lines(memory)))
    if model.config.has_vision_tower:
        print(picture_line(model.config.picture_layout, training_args.model_max_length))
