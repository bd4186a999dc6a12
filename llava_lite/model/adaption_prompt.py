"""Prompts in the attention of a decoder's last layers, closed by gates that start at zero.

LLaMA-Adapter (Zhang et al. 2023, arXiv 2303.16199) and its V2 (Gao et al. 2023, arXiv 2304.15010); ImageBind-LLM (Han
et al. 2023, arXiv 2309.03905) has one prompt a layer. A layer adds to its attention, before the output projection,
tanh(gate) * softmax(q k_p) v_p: k_p and v_p are the layer's own projections of its prompts, without positions, and a
prompt is a learned vector plus one of the image. No token of the text stands for an image.

B batch, n samples, H heads, Hkv key heads, L positions, Dh width of a head, D model width, Q layers with prompts, K
prompts of a layer.
"""

from __future__ import annotations

import logging
import re
from contextvars import ContextVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers import initialization as init
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from llava_lite.checkpoints.copying import gathered
from llava_lite.model.attention import repeat_heads, varlen_attention, varlen_mask

logger = logging.getLogger(__name__)

PREFIX = "adaption_prompt_"
# Weights that a base without prompts lacks.
NEW_WEIGHTS = re.compile(r"^model\.adaption_prompt\.query$|\.self_attn\.adaption_(new_)?gate$")


class AdaptionPrompt(nn.Module):
    """The table of all learned prompts, `query` [Q * K, D]: the K of the first layer with prompts come first."""

    def __init__(self, num_layers: int, num_prompts: int, width: int):
        super().__init__()
        self.num_layers = num_layers
        self.query = nn.Parameter(torch.empty(num_layers * num_prompts, width))

    def draw(self) -> None:
        """Draw the prompts from a normal distribution, as the originals do."""
        init.normal_(self.query)

    def forward(self, visual: torch.Tensor | None = None) -> torch.Tensor:
        """Return the prompts of all layers, [Q, n, K, D] with those of the images [n, K, D], else [Q, 1, K, D]."""
        prompts = self.query.unflatten(0, (self.num_layers, -1))[:, None]
        return prompts if visual is None else prompts.to(visual.dtype) + visual


def add_prompts(stack, config) -> None:
    """Give a decoder stack the table of prompts, its last layers their gates, and all its layers the attention.

    Raises ValueError if the connector makes another number of vectors than a layer has prompts.
    """
    if config.has_vision_tower and config.num_image_tokens != config.adaption_prompt_len:
        raise ValueError(
            f"the connector {config.mm_projector_type!r} makes {config.num_image_tokens} vectors of an image and "
            f"adaption_prompt_len {config.adaption_prompt_len} asks for as many as prompts; set mm_query_len with "
            "query_vit, or mm_vision_select_feature pooled and adaption_prompt_len 1."
        )
    stack.adaption_prompt = AdaptionPrompt(config.num_prompted_layers, config.adaption_prompt_len, config.hidden_size)
    for layer in stack.layers[-config.num_prompted_layers :]:
        layer.self_attn.adaption_gate = nn.Parameter(torch.zeros(config.num_attention_heads))
        if config.adaption_prompt_new_gate:
            layer.self_attn.adaption_new_gate = nn.Parameter(torch.ones(1))
    # The decoder's own alone: the tower has no prompts.
    config._attn_implementation = {"": prompted_name(config._attn_implementation)}


@torch.no_grad()
def init_prompts(module: nn.Module) -> None:
    """Initialise the weights of this file in a module, for transformers' `_init_weights`."""
    if isinstance(module, AdaptionPrompt):
        module.draw()
    for name, value in (("adaption_gate", 0.0), ("adaption_new_gate", 1.0)):
        if getattr(module, name, None) is not None:
            init.constant_(getattr(module, name), value)


def gates_are_open(model: nn.Module) -> bool:
    """Return whether images reach the loss: a model has no gates, or one of them is not zero; all ranks call it."""
    gates = [weight for name, weight in model.named_parameters() if name.endswith("adaption_gate")]
    with gathered(gates):
        return not gates or any(bool(gate.any()) for gate in gates)


def prompted_name(name: str | None) -> str:
    """Return the name of the attention with prompts that computes the rest as `name` does.

    flash-attn looks its kernel up by the name in the config, so torch's variable-length kernel stands in for it.
    """
    name = (name or "sdpa").removeprefix(PREFIX)
    if name.startswith("flash_attention"):
        logger.info("attention: varlen in place of %s, which cannot be given prompts.", name)
        name = "varlen"
    if name not in BASES:
        raise ValueError(f"attn_implementation {name!r} with mm_injection adaption_prompt; known: {', '.join(BASES)}.")
    return PREFIX + name


def check_prompted(config) -> None:
    """Raise ValueError if attention without prompts was chosen for a model with prompts."""
    if not (config._attn_implementation or "").startswith(PREFIX):
        raise ValueError(
            f"the attention is {config._attn_implementation!r}, which would leave the prompts out; choose it by "
            "attn_implementation= of from_pretrained or by the model's set_attn_implementation."
        )


# What layers of transformers that hand no keyword on (StableLM) were called with, for each thread; see KeepsKeywords.
_KEPT: ContextVar[tuple] = ContextVar("keywords of a layer", default=(None, None))


class KeepsKeywords:
    """For a layer of transformers that calls its attention without its keywords: keep them while it runs."""

    def forward(self, *args, adaption_prompts=None, cu_seq_lens_q=None, **kwargs):
        """Run the layer of transformers."""
        token = _KEPT.set((adaption_prompts, cu_seq_lens_q))
        try:
            return super().forward(*args, **kwargs)
        finally:
            _KEPT.reset(token)


class PromptedAttention:
    """`set_attn_implementation` for a model that may have prompts: no name leaves them out."""

    # For a decoder whose layers hand no keyword on, the class of those that do.
    prompted_layer: type | None = None

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """Set the attention by name, as in transformers; a model with prompts keeps them."""
        if self.config.has_prompts:
            names = attn_implementation
            if not isinstance(names, dict):
                names = {"": names, "vision_config": names}
            if "" in names:
                names = names | {"": prompted_name(names[""])}
            attn_implementation = names
        super().set_attn_implementation(attn_implementation, *args, **kwargs)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Return ([B, L, H, Dh], weights [B, H, L, K]) with all weights in memory, as transformers' eager attention does.

    query [B, H, L, Dh]; key, value [B, Hkv, K, Dh]; attention_mask [B, 1, L, K] is added to the scores, or None.
    """
    key, value = (repeat_heads(t, query.shape[1]) for t in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


# Name -> attention and mask function.
BASES = {
    "sdpa": (sdpa_attention_forward, sdpa_mask),
    "varlen": (varlen_attention, varlen_mask),
    "eager": (eager_attention, eager_mask),
}


def with_prompts(attend):
    """Return an attention function for transformers that adds the term of the prompts to the output of `attend`."""

    def attention(module, query, key, value, attention_mask, adaption_prompts=None, **kwargs):
        out, weights = attend(module, query, key, value, attention_mask, **kwargs)
        gate, ends = getattr(module, "adaption_gate", None), kwargs.get("cu_seq_lens_q")
        if gate is None:
            return out, weights
        if adaption_prompts is None:
            adaption_prompts, ends = _KEPT.get()
        if adaption_prompts is None:
            raise ValueError(
                f"layer {module.layer_idx} has a gate and was called without adaption_prompts; call the model, not "
                "its layers."
            )
        first = module.config.num_hidden_layers - len(adaption_prompts)
        prompts = adaption_prompts[module.layer_idx - first]  # [n, K, D]
        term = attend_prompts(module, query, prompts, kwargs.get("scaling"), ends)
        scale = torch.tanh(gate)[:, None]  # [H, 1]
        new_gate = getattr(module, "adaption_new_gate", None)
        scale = scale if new_gate is None else scale * new_gate
        return out + scale.to(out.dtype) * term, weights

    return attention


def attend_prompts(module, query, prompts, scaling=None, ends=None) -> torch.Tensor:
    """Return softmax(q k_p) v_p [B, L, H, Dh] of queries [B, H, L, Dh] and the prompts [n, K, D] of their samples.

    n: B; or 1 for all; or, with ends int [n + 1], the samples of packed rows. K = 1 needs no softmax.
    """
    batch, num_heads, length, _ = query.shape
    keys, values = project_prompts(module, prompts.to(query.dtype))  # [n, Hkv, K, Dh]
    keys, values = (repeat_heads(t, num_heads) for t in (keys, values))
    is_packed = ends is not None and len(prompts) > 1
    if not is_packed and len(prompts) not in (1, batch):
        raise ValueError(f"prompts of {len(prompts)} samples for a batch of {batch}; expected one for each.")
    if is_packed:
        if len(ends) - 1 != len(prompts):
            raise ValueError(
                f"prompts of {len(prompts)} samples for packed rows of {len(ends) - 1}; expected one for each."
            )
        owners = torch.repeat_interleave(ends.diff().long())  # [B * L]
    if prompts.shape[1] == 1:
        term = values.transpose(1, 2)  # [n, 1, H, Dh]
        return term[owners].view(batch, length, num_heads, -1) if is_packed else term
    if not is_packed:
        keys, values = (t.expand(batch, -1, -1, -1) for t in (keys, values))
        return F.scaled_dot_product_attention(query, keys, values, scale=scaling).transpose(1, 2)
    # All prompts of all samples side by side; a position sees those of its own.
    keys, values = (t.transpose(0, 1).flatten(1, 2)[None] for t in (keys, values))  # [1, H, n * K, Dh]
    rows = query.transpose(0, 1).flatten(1, 2)[None]  # [1, H, B * L, Dh]
    samples = torch.arange(len(prompts), device=query.device).repeat_interleave(prompts.shape[1])
    mask = owners[:, None] == samples  # [B * L, n * K]
    term = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scaling)
    return term[0].transpose(0, 1).unflatten(0, (batch, length))


def project_prompts(module, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values [n, Hkv, K, Dh] of prompts [n, K, D] by the projections of an attention module.

    A LoRA on them applies to the text alone, unless the config has adaption_prompt_lora; a norm of the keys' heads
    (Qwen3) applies to both.
    """
    width = module.head_dim

    def project(linear):
        if not getattr(module.config, "adaption_prompt_lora", False):
            linear = getattr(linear, "base_layer", linear)
        return linear(prompts).unflatten(-1, (-1, width)).transpose(1, 2)

    keys, values = project(module.k_proj), project(module.v_proj)
    norm = getattr(module, "k_norm", None)
    if norm is None and getattr(module, "qk_layernorm", False):
        norm = module.k_layernorm
    return (keys if norm is None else norm(keys)), values


for _name, (_attend, _mask) in BASES.items():
    AttentionInterface.register(PREFIX + _name, with_prompts(_attend))
    AttentionMaskInterface.register(PREFIX + _name, _mask)
