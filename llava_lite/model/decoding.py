"""Run one new position of each row through a decoder on the CPU, with fewer operations than its layers' own bodies.

The same numbers as the stock forward pass of a Llama-shaped stack up to rounding. A step at batch 1 reads every weight
once and computes little, so what counts is how fast a product of one row streams its weight, and how many small
operations stand between the products.

B rows, H heads, Hk key heads, G query heads of one key head, K positions seen, Dh width of a head, D model width.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.nn.modules import module as _hooks
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralDecoderLayer, MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP

from llava_lite.model.kv_cache import GrowingLayer

# One shape: norm, q/k/v (Qwen3 norms q and k), RoPE on whole heads, attention, sum, norm, MLP, sum.
LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)
ATTENTIONS = (LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention)
GATED_MLPS = (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP)


def can_step(stack, embeds, attention_mask, cache, arguments) -> bool:
    """Tell whether `step` gives what the stack's own forward pass would, nothing beside it having been asked for.

    embeds: [B, L, D]. arguments: further keywords of the call.
    """
    return (
        embeds is not None
        and embeds.shape[1] == 1
        and runs_here(stack, embeds, attention_mask, cache, arguments)
        and all(layer.is_initialized for layer in cache.layers)
    )


def runs_here(stack, embeds, attention_mask, cache, arguments) -> bool:
    """Tell whether stack and call are such that the bodies of this package's inference are the stock ones.

    arguments: further keywords of the call; one that says anything is the stock pass's business.
    """
    return (
        embeds.device.type == "cpu"
        and embeds.dtype == torch.float32
        and not (stack.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        and not torch.is_autocast_enabled("cpu")
        and "layers" not in stack.plain_paths
        # Our varlen hands decoding steps to the same kernel.
        and stack.config._attn_implementation in ("sdpa", "varlen")
        and not (stack.config.output_attentions or stack.config.output_hidden_states)
        and all(is_default(name, value) for name, value in arguments.items())
        # A static cache of a decoder that slides in some layers comes with a dict of masks.
        and (attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2))
        and cache is not None
        and len(cache.layers) == len(stack.layers)
        and all(type(layer) is GrowingLayer for layer in cache.layers)
        and all(is_known(layer) for layer in stack.layers)
    )


def is_default(name, value) -> bool:
    """Tell whether a keyword of the stack's call asks for nothing but the usual output."""
    return value is True if name == "return_dict" else value is None or value is False


def is_known(layer) -> bool:
    """Tell whether a layer and its attention are of the known shape and need not be called by name."""
    return (
        isinstance(layer, LAYERS)
        and isinstance(layer.self_attn, ATTENTIONS)
        and is_unobserved(layer)
        and is_unobserved(layer.self_attn)
    )


def is_unobserved(module) -> bool:
    """Tell whether nobody listens to a module's calls, or to all modules', or runs something in its place."""
    hooks = module._forward_hooks or module._forward_pre_hooks or _hooks._global_forward_hooks
    return not (hooks or _hooks._global_forward_pre_hooks or "forward" in module.__dict__)


def step(stack, embeds, attention_mask, position_ids, cache) -> BaseModelOutputWithPast:
    """Return the hidden states [B, 1, D] of embeddings [B, 1, D], adding their keys and values to the cache.

    attention_mask: [B, K] with the new position, zeros at padding, or None where nothing is padded.
    """
    if position_ids is None:
        position_ids = torch.full((1, 1), cache.get_seq_length())
    cos, sin = (part[:, None] for part in stack.rotary_emb(embeds, position_ids=position_ids))  # [B, 1, 1, Dh]
    sin = signed(sin)
    mask = None  # [B, 1, 1, K]
    if attention_mask is not None and not bool(attention_mask.all()):
        mask = attention_mask[:, None, None].bool()
    hidden = embeds
    for layer, past in zip(stack.layers, cache.layers, strict=True):
        hidden = hidden + attend(layer.self_attn, layer.input_layernorm(hidden), cos, sin, mask, past)
        hidden = hidden + feed_forward(layer.mlp, layer.post_attention_layernorm(hidden))
    return BaseModelOutputWithPast(last_hidden_state=stack.norm(hidden), past_key_values=cache)


def attend(attention, hidden, cos, sin, mask, past) -> torch.Tensor:
    """Return what attention adds to the hidden states [B, 1, D]; cos, sin: [B, 1, 1, Dh], sin as `signed` makes it."""
    num_rows = hidden.shape[0]
    shape = (num_rows, 1, -1, attention.head_dim)
    query, key = attention.q_proj(hidden).view(shape), attention.k_proj(hidden).view(shape)
    value = attention.v_proj(hidden).view(shape)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    keys, values = past.update(key.transpose(1, 2), value.transpose(1, 2))  # [B, Hk, K, Dh]
    # Query heads that share a key head are rows of one product, so that no key is copied.
    query = query.view(num_rows, keys.shape[1], -1, attention.head_dim)  # [B, Hk, G, Dh]
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=attention.scaling)
    return attention.o_proj(out.reshape(num_rows, 1, -1))


def feed_forward(mlp, hidden) -> torch.Tensor:
    """Return what the MLP, or the experts in its place, add to the hidden states [B, 1, D]."""
    if not (isinstance(mlp, GATED_MLPS) and is_unobserved(mlp)):
        return mlp(hidden)
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(hidden)).mul_(mlp.up_proj(hidden)))


def signed(sin) -> torch.Tensor:
    """Return [-sin, sin] of [sin, sin], the sign that a rotation gives to the halves of a head."""
    half = sin.shape[-1] // 2
    return torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)


def rotate(states, cos, sin) -> torch.Tensor:
    """Return states [B, 1, heads, Dh] turned by RoPE, whose pairs are the two halves of a head."""
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, -1), sin)
