"""Turn a dense model into an MoE model with the same outputs: every expert starts as a copy of the dense MLP.

Sparse Upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055), as MoE-LLaVA does it for its third stage.
"""

import logging

import torch

from llava_lite.checkpoints.copying import gathered, is_partitioned
from llava_lite.model.moe.block import MoeBlock
from llava_lite.model.moe.config import read_moe_config
from llava_lite.model.plain_paths import install_fast_paths

logger = logging.getLogger(__name__)


def upcycle(model, moe, seed=0):
    """Replace the MLPs that `moe` names by MoeBlocks made of copies, and write `moe` into the model's config.

    model: a loaded dense model, in any dtype; if ZeRO-3 has partitioned it, all ranks must call this.
    moe: the dict for `config.moe`. seed: of the routers, which are drawn from U(-1/sqrt(D), 1/sqrt(D)).
    With top-2 and more the outputs do not change; with top-1 they are scaled by its probability, as in MoE-LLaVA.
    Raises ValueError if the model has experts already or `moe` asks for none.
    """
    layers = model.get_decoder().layers
    with_experts = [idx for idx, layer in enumerate(layers) if isinstance(layer.mlp, MoeBlock)]
    if with_experts:
        raise ValueError(
            f"layers {with_experts} of this model have experts already, so its MLPs cannot be copied into new ones. "
            "Start from the dense checkpoint of stage 2, or continue this one without the flags that make experts."
        )
    config = read_moe_config(moe, len(layers))
    if config is None:
        raise ValueError(f"nothing to make experts from: moe is {moe!r}; it needs moe_enable true.")
    generator = torch.Generator().manual_seed(seed)
    for layer_idx, num_experts in zip(config.layers, config.num_experts, strict=True):
        layer = layers[layer_idx]
        layer.mlp = _copy_to_experts(model.config, config, num_experts, layer.mlp, layer_idx, generator)
    model.config.moe = config.to_dict()
    logger.info("Layers %s have experts now, %s of them.", list(config.layers), list(config.num_experts))


def _copy_to_experts(model_config, moe, num_experts, dense_mlp, layer_idx, generator):
    """Return a MoeBlock whose experts are copies of the dense MLP, partitioned if the dense MLP was."""
    params = list(dense_mlp.parameters())
    partitioned = next((param for param in params if is_partitioned(param)), None)
    with torch.no_grad(), gathered(params):
        block = MoeBlock(model_config, moe, num_experts, dense_mlp, layer_idx).train(dense_mlp.training)
        install_fast_paths(block.experts)
        block.experts.copy_dense_mlp(dense_mlp)
        draw_uniform(block.gate.weight, generator)
        if moe.use_residual:
            draw_uniform(block.coefficient.weight, generator)
            block.coefficient.bias.zero_()
    if partitioned is not None:
        fresh = [param for param in block.parameters() if not is_partitioned(param)]
        partitioned.convert_to_zero_parameters(param_list=fresh)
    return block


def draw_uniform(weight, generator):
    """Fill `weight` [out, D] from U(-1/sqrt(D), 1/sqrt(D)); the same numbers on every rank, device and dtype."""
    bound = weight.shape[1] ** -0.5
    weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
