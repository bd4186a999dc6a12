"""Expert parallelism: give each rank its experts of every MoE layer, and gather them again for a save.

DeepSpeed knows expert-parallel layers as AutoEP (0.19.8): it reduces the gradients of experts in their
expert-data-parallel group, and its checkpoints hold each rank's experts. AutoEP would replace our MoE block and
silently lose balance loss, padding mask, float32 router and metrics, so our block stays: it is an AutoEPMoELayer to
the engine, and only its experts change.
"""

import logging

import torch

from llava_lite.checkpoints.copying import gathered, is_partitioned
from llava_lite.model.moe.block import MoeBlock
from llava_lite.model.moe.parallel import SHARDS, ParallelExperts
from llava_lite.train.arguments.refuse import raise_if
from llava_lite.train.deepspeed.private import (
    EXPERTS,
    check_private_parts,
    describe_for_checkpoint,
    get_expert_groups,
    get_parallel_block_class,
)

logger = logging.getLogger(__name__)


def split_experts(model, ep_size, config):
    """Leave on this rank its experts of every layer; all ranks must call this, before the optimizer is made.

    config: the run's DeepSpeed JSON as a dict. Raises, before any layer is changed, ValueError if the experts are of a
    kind that cannot be divided, ImportError if the installed DeepSpeed lacks what this uses.
    """
    check_experts_divide(model, ep_size, config)
    check_private_parts(f"--ep_size {ep_size}", EXPERTS)
    split_blocks(model, *get_expert_groups(ep_size))
    first = next(iter(model.moe_layers().values()))
    logger.info(
        "experts over %d ranks: each holds %d of %d a layer.", ep_size, first.experts.num_experts, first.num_experts
    )


def check_experts_divide(model, ep_size, config):
    """Raise ValueError that names what keeps the experts of a model from being divided among ranks."""
    flag = f"--ep_size {ep_size}"
    blocks = model.moe_layers()
    raise_if(not blocks, f"{flag}: this model has no experts; drop the flag, or make some with --moe_enable True.")
    for layer, block in blocks.items():
        shape = block.experts.shape
        where = f"{flag}: layer {layer}"
        raise_if(
            block.num_experts % ep_size > 0,
            f"{where} has {block.num_experts} experts, which {ep_size} ranks cannot divide evenly.",
        )
        raise_if(
            not shape.gated or shape.biased,
            f"{where} has experts of {' and '.join(shape.up_names)}{' with biases' if shape.biased else ''}; only "
            "gated ones without biases (gate_proj, up_proj, down_proj) can be divided among ranks. Use --ep_size 1.",
        )
        raise_if(
            block.moe.use_residual, f"{where} keeps a dense MLP beside its experts (use_residual). Use --ep_size 1."
        )
        raise_if(block.moe.moe_drop_tokens, f"{where} drops tokens (moe_drop_tokens). Use --ep_size 1.")
        frozen = [name for name, weight in block.experts.named_parameters() if not weight.requires_grad]
        raise_if(
            bool(frozen),
            f"{where}: {', '.join(frozen)} of the experts do not train, for which DeepSpeed's checkpoints have no "
            "place. Train all of the experts, or use --ep_size 1.",
        )
    raise_if(
        bool(config.get("expert_parallel", {}).get("enabled")),
        f"{flag} and expert_parallel in the DeepSpeed JSON divide the experts twice; drop the entry.",
    )
    zero = config.get("zero_optimization", {})
    on_nvme = zero.get("stage") == 3 and (zero.get("offload_optimizer") or {}).get("device") == "nvme"
    raise_if(
        on_nvme,
        f"{flag} with the optimizer on NVMe under ZeRO-3: DeepSpeed could not save the experts. Offload to the CPU, "
        "or use --ep_size 1.",
    )


def split_blocks(model, name, group, data_group):
    """Replace each MoE block of a model by one whose experts are those of this rank.

    name: DeepSpeed's for the groups. group: the ranks that share the experts of a layer. data_group: the
    expert-data-parallel group, whose ranks hold the same experts.
    """
    blocks = [(path, module) for path, module in model.named_modules() if isinstance(module, MoeBlock)]
    for path, block in blocks:
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, split_block(block, name, group, data_group))


def split_block(block, name, group, data_group):
    """Return a block in place of `block`, with its hooks and its router, and of its experts those of this rank."""
    complete = list(block.experts.parameters())
    partitioned = next((weight for weight in complete if is_partitioned(weight)), None)
    with torch.no_grad(), gathered(complete):
        experts = ParallelExperts(block.experts, group)
    parallel = get_parallel_block_class()(block, experts, name)
    weights = [getattr(experts, shard) for shard in SHARDS]
    for weight in weights:
        mark_expert_weight(weight, name, experts.num_ranks, data_group)
        describe_for_checkpoint(parallel, weight)
    if partitioned is not None:
        partitioned.convert_to_zero_parameters(param_list=weights)
    return parallel


def mark_expert_weight(weight, name, num_ranks, data_group):
    """Mark a weight [E / R, ...] as an expert's: its gradient is reduced in the expert-data-parallel group alone.

    The block stays a leaf to ZeRO-3: hooks on the experts would fetch before or after a layer is recomputed, depending
    on the graph, and whether padding is cut out of it differs from rank to rank.
    """
    # The public convention of deepspeed.moe; num_shards is read by train.tuning.count.
    weight.allreduce, weight.group_name, weight.num_shards = False, name, num_ranks
    # ZeRO-3 partitions the weight in this group.
    weight.ds_zero_placement_family = "autoep_expert"
    weight.ds_zero_partition_group_name, weight.ds_zero_partition_process_group = name, data_group


def parallel_experts(model):
    """Return the expert-parallel experts of a model by name; {} where every rank holds all."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ParallelExperts)}


def with_all_experts(model, state, keep):
    """Return `state`, the weights of a model by name, with the experts of all ranks in place of this rank's.

    All ranks must call it; those without `keep` get what they gave.
    """
    for name, experts in parallel_experts(model).items():
        with gathered(experts.parameters()):
            complete = experts.all_shards(keep)
        if keep:
            for shard in SHARDS:
                del state[f"{name}.{shard}"]
            state.update({f"{name}.{fused}": weight for fused, weight in complete.items()})
    return state


def needs_all_ranks(model):
    """Tell whether a forward pass on one rank waits for the others: under ZeRO-3 and with expert parallelism."""
    return any(is_partitioned(param) for param in model.parameters()) or bool(parallel_experts(model))
