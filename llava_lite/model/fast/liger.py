"""Replace a decoder's norms and gated MLPs by Liger's layers, for training on CUDA.

Liger Kernel (Hsu et al. 2024, arXiv 2410.10989). Its `apply_liger_kernel_to_llama(model=...)` also replaces classes
and functions in transformers' own modules, for every model of the process (0.8.5). Its layers are public too, so here
each one is put in place by itself. Rotary embedding stays transformers': there it is a function and not a layer.
"""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm
from transformers.models.stablelm.modeling_stablelm import StableLmMLP

from llava_lite.model.matmul import share_weights

logger = logging.getLogger(__name__)

NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
GATED_MLPS = (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP, StableLmMLP)


def install_liger(model: nn.Module) -> None:
    """Replace RMS norms and SwiGLU MLPs of a model's decoder by Liger's, with the same parameters and names.

    Does nothing where liger-kernel is not installed. Experts, tower, connector and layers of other classes stay. What
    was replaced is logged. The kernels run on CUDA only.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        return
    counts = Counter()
    for parent in [model.get_decoder(), *model.get_decoder().layers.modules()]:
        for name, layer in list(parent.named_children()):
            if type(layer) in NORMS:
                parent.add_module(name, make_norm(layer))
                counts["RMS norms"] += 1
            elif type(layer) in GATED_MLPS and layer.config.hidden_act in ("silu", "swish"):
                parent.add_module(name, make_mlp(layer))
                counts["SwiGLU MLPs"] += 1
    if counts:
        logger.info("liger-kernel: %s replaced.", " and ".join(f"{count} {what}" for what, count in counts.items()))


def make_norm(norm: nn.Module) -> nn.Module:
    """Return Liger's RMS norm with the very weight of a norm of transformers."""
    from liger_kernel.transformers import LigerRMSNorm

    with torch.device("meta"):
        made = LigerRMSNorm(len(norm.weight), eps=norm.variance_epsilon)
    return share_weights(made, norm)


def make_mlp(mlp: nn.Module) -> nn.Module:
    """Return Liger's SwiGLU MLP with the very layers of an MLP of transformers."""
    from liger_kernel.transformers import LigerSwiGLUMLP

    with torch.device("meta"):
        made = LigerSwiGLUMLP(mlp.config)
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(made, name, getattr(mlp, name))
    return made.train(mlp.training)
