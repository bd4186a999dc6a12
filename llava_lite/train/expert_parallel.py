"""Turn a model with all experts on every rank into one whose ranks share them out, and back for a save.

DeepSpeed knows such experts by its own AutoEP (0.19.8): it reduces their gradients among the ranks that hold the same
ones, and writes and reads them one by one. Different here: AutoEP would put a block of its own in the place of ours,
and with it balance loss, mask of padding, float32 router and log are gone without a word. Our block stays, is an
AutoEPMoELayer to the engine, and only its experts are others.
"""

import logging
from functools import cache

import torch

from llava_lite.contradictions import refuse
from llava_lite.model.moe import MoeBlock
from llava_lite.model.weights import gathered, is_partitioned
from llava_lite.train.parallel_experts import SHARES, ParallelExperts

logger = logging.getLogger(__name__)


def split_experts(model, ep_size, config):
    """Leave on this rank its share of the experts of every layer; all ranks must call this, before the optimizer.

    config: the run's DeepSpeed JSON as a dict. Raises ValueError, before any layer is changed, if the experts are of
    a kind that cannot be shared out.
    """
    if ep_size == 1:
        return
    refuse_unshareable_experts(model, ep_size, config)
    from deepspeed.utils import groups

    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)
    group, twins = groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)
    for block in model.moe_layers().values():
        split_block(block, name, group, twins)
    first = next(iter(model.moe_layers().values()))
    logger.info(
        "experts over %d ranks: each holds %d of %d a layer.", ep_size, first.experts.num_experts, first.num_experts
    )


def refuse_unshareable_experts(model, ep_size, config):
    """Raise ValueError that names what keeps the experts of a model from being shared out."""
    said = f"--ep_size {ep_size}"
    blocks = model.moe_layers()
    refuse(not blocks, f"{said}: this model has no experts; drop the flag, or make some with --moe_enable True.")
    for layer, block in blocks.items():
        shape = block.experts.shape
        where = f"{said}: layer {layer}"
        refuse(
            block.num_experts % ep_size > 0,
            f"{where} has {block.num_experts} experts, which {ep_size} ranks cannot share evenly.",
        )
        refuse(
            not shape.gated or shape.biased,
            f"{where} has experts of {' and '.join(shape.up_names)}{' with biases' if shape.biased else ''}; only "
            "gated ones without biases (gate_proj, up_proj, down_proj) can be shared out. Use --ep_size 1.",
        )
        refuse(
            block.moe.use_residual, f"{where} keeps a dense MLP beside its experts (use_residual). Use --ep_size 1."
        )
        refuse(block.moe.moe_drop_tokens, f"{where} drops tokens (moe_drop_tokens). Use --ep_size 1.")
        frozen = [name for name, weight in block.experts.named_parameters() if not weight.requires_grad]
        refuse(
            bool(frozen),
            f"{where}: {', '.join(frozen)} of the experts do not train, which DeepSpeed's checkpoints have no place "
            "for. Train all of the experts, or use --ep_size 1.",
        )
    refuse(
        bool(config.get("expert_parallel", {}).get("enabled")),
        f"{said} and expert_parallel in the DeepSpeed JSON share the experts out twice; drop the entry.",
    )
    zero = config.get("zero_optimization", {})
    on_nvme = zero.get("stage") == 3 and (zero.get("offload_optimizer") or {}).get("device") == "nvme"
    refuse(
        on_nvme,
        f"{said} with the optimizer on NVMe under ZeRO-3: DeepSpeed could not save the experts. Offload to the CPU, "
        "or use --ep_size 1.",
    )


def split_block(block, name, group, twins):
    """Turn the experts of a block into this rank's share of them.

    name: DeepSpeed's for the partition. group: the ranks that share the experts. twins: those that hold the same.
    """
    whole = list(block.experts.parameters())
    partitioned = next((weight for weight in whole if is_partitioned(weight)), None)
    # In place: the experts keep their config, activation and kind, and the block its hooks and its router.
    block.experts.__class__ = ParallelExperts
    with torch.no_grad(), gathered(whole):
        block.experts.take_share(group)
    weights = [getattr(block.experts, share) for share in SHARES]
    tell_deepspeed(block, weights, name, twins)
    if partitioned is not None:
        partitioned.convert_to_zero_parameters(param_list=weights)


def tell_deepspeed(block, weights, name, twins):
    """Make a block an AutoEPMoELayer to the engine, and its weights [E / R, ...] expert parameters."""
    from deepspeed.checkpoint import autoep_affine, constants

    num_ranks = block.experts.num_ranks
    block.__class__ = block_of_autoep()
    block.ep_size, block.ep_group_name = num_ranks, name
    block.ep_group, block.ep_rank = block.experts.group, torch.distributed.get_rank(block.experts.group)
    block.num_local_experts = block.experts.num_experts
    placement = autoep_affine.legacy_uniform_autoep_placement_descriptor(
        block.num_experts, block.num_local_experts, num_ranks
    )
    block.expert_placement_descriptor = placement
    # The block stays a leaf to ZeRO-3: hooks on the experts would fetch before or after a layer is recomputed, as the
    # graph goes, and whether padding is cut out of it differs from rank to rank.
    for weight in weights:
        weight.allreduce, weight.group_name, weight.num_shares = False, name, num_ranks
        weight.ds_zero_placement_family = "autoep_expert"
        weight.ds_zero_partition_group_name, weight.ds_zero_partition_process_group = name, twins
        shape = [block.num_experts, *weight.shape[1:]]
        held = {
            constants.AUTOEP_EXPERT_PLACEMENT: placement,
            constants.AFFINE_MAP: autoep_affine.autoep_placement_to_affine_map(placement, shape).to_dict(),
            constants.AUTOEP_PARAM_LOGICAL_SHAPE: shape,
            constants.AUTOEP_PARAM_EP_RANK: block.ep_rank,
            constants.AUTOEP_PARAM_LOCAL_EXPERTS: autoep_affine.autoep_experts_for_rank(placement, block.ep_rank),
        }
        setattr(weight, constants.DS_AUTOEP_UC_META, held)


@cache
def block_of_autoep():
    """Return the class of blocks that are ours in what they do and AutoEP's to the engine."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    return type("ParallelMoeBlock", (MoeBlock, AutoEPMoELayer), {"__doc__": MoeBlock.__doc__})


def parallel_experts(model):
    """Return the shared out experts of a model by name; {} where every rank holds all."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ParallelExperts)}


def with_all_experts(model, state, keep):
    """Return `state`, a plain model's weights by name, with the experts of all ranks in place of this rank's share.

    All ranks must call it; those without `keep` get what they gave.
    """
    for name, experts in parallel_experts(model).items():
        with gathered(experts.parameters()):
            whole = experts.all_shares(keep)
        if keep:
            for held in SHARES:
                del state[f"{name}.{held}"]
            state.update({f"{name}.{fused}": weight for fused, weight in whole.items()})
    return state


def needs_all_ranks(model):
    """Tell whether a forward pass on one rank waits for the others: under ZeRO-3, and for experts of other ranks."""
    return any(is_partitioned(param) for param in model.parameters()) or bool(parallel_experts(model))
