"""Choose how many decoder layers are recomputed in the backward pass: as few as memory makes necessary."""

import logging
import os

from llava_lite.checkpoints.memory import free_ram
from llava_lite.distributed.ranks import everyone
from llava_lite.train.estimate.memory import estimate_memory, get_offload, gib, longest_batch, spread_layers

logger = logging.getLogger(__name__)

# The fraction of the free memory that a plan may fill: the rest is for what Memory does not count. On a CPU loader
# workers and other programs need memory too.
USABLE_FRACTION = {"cuda": 0.88, "cpu": 0.6}


def choose_checkpointing(model, dataset, training_args, ep_size=1):
    """With --gradient_checkpointing auto, checkpoint as few layers as the longest micro-batch allows, and log why.

    All ranks must call it, and get the same number: that of the checkpointed layers.
    """
    args, num_layers = training_args, len(model.get_model().layers)
    if not args.auto_checkpointing:
        return count_checkpointed(args, num_layers)
    num_tokens = longest_batch(dataset, args)
    where = {"offload": get_offload(args), "device_type": args.device.type}

    def memory_with(number):
        return estimate_memory(model, args, num_tokens, num_tokens, number, ep_size=ep_size, **where)

    held = sum(param.numel() * param.element_size() for param in model.parameters() if param.device.type == "cpu")
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    budget = min(everyone(usable_bytes(args.device, local_ranks, held)))
    chosen = count_checkpointed(args, num_layers, lambda number: memory_with(number).total, budget)
    none, needed = memory_with(0).total, memory_with(chosen).total
    logger.info(
        "--gradient_checkpointing auto: %d of %d layers. %s of %s (%d%% of the free memory) are needed with %s tokens "
        "in a micro-batch, all supervised; %s without checkpointing.",
        *(chosen, num_layers, gib(needed), gib(budget), 100 * USABLE_FRACTION.get(args.device.type, 0.88)),
        *(f"{num_tokens:,}", gib(none)),
    )
    if needed > budget:
        logger.warning(
            "more than the free memory: expect to run out of it. Use smaller micro-batches with more "
            "--gradient_accumulation_steps, more ranks with --deepspeed zero3, or --deepspeed zero3_offload."
        )
    if chosen:
        checkpoint_layers(model, spread_layers(num_layers, chosen))
    return chosen


def count_checkpointed(training_args, num_layers, total_of=None, budget=None):
    """Return how many layers a run recomputes: all or none by --gradient_checkpointing; with auto the fewest that fit.

    total_of: bytes of a device by the number of checkpointed layers. budget: bytes that it may fill.
    """
    if training_args.auto_checkpointing:
        return fewest_checkpointed(num_layers, total_of, budget)
    return num_layers if training_args.gradient_checkpointing else 0


def fewest_checkpointed(num_layers, total_of, budget):
    """Return the least number of checkpointed layers for which `total_of(number)` is at most `budget`; else all."""
    return next((number for number in range(num_layers) if total_of(number) <= budget), num_layers)


def usable_bytes(device, num_local_ranks=1, held=0):
    """Return the bytes of a device that a rank may fill, including those that it already holds.

    held: bytes of its tensors on the CPU, where they count as used.
    """
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return USABLE_FRACTION["cuda"] * (free + torch.cuda.memory_reserved(device))
    return USABLE_FRACTION["cpu"] * (free_ram() / num_local_ranks + held)


def checkpoint_layers(model, chosen):
    """Checkpoint the decoder layers with these numbers and no others, and all layers of a tower that trains."""
    # transformers 5.17 has the older name only; 5.23 warns of it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for number, layer in enumerate(model.get_model().layers):
        layer.gradient_checkpointing = number in chosen
    tower = model.get_vision_tower()
    if tower is not None and not any(param.requires_grad for param in tower.parameters()):
        for module in tower.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
