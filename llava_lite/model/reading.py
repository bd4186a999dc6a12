"""Read a prompt into an empty cache on the CPU: no padding is computed, and of the last layer only what is asked for.

The same numbers as the stock forward pass of a dense Llama-shaped stack up to rounding. The rows' real tokens stand
behind each other, as samples do in a packed row of training, and go through the same attention and the same fused
norms, gates and turns.

B rows, L positions with padding, T real ones of all rows, H heads, Hk key heads, Dh width of a head, D model width.
"""

from __future__ import annotations

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from llava_lite.model.cpu_attention import attend_on_cpu
from llava_lite.model.decoding import GATED_MLPS, is_unobserved, runs_here
from llava_lite.model.fast_layer import FastNorm
from llava_lite.model.fused import rms_norm, rotate, swiglu


def can_read(stack, embeds, attention_mask, position_ids, cache, arguments) -> bool:
    """Tell whether `read` gives what the stack's own forward pass would, nothing beside it having been asked for."""
    return (
        embeds is not None
        and embeds.shape[1] > 1
        and runs_here(stack, embeds, attention_mask, cache, arguments)
        and cache.get_seq_length() == 0
        and position_ids is not None
        and all(isinstance(layer.mlp, GATED_MLPS) for layer in stack.layers)
        and stack.config.hidden_act in ("silu", "swish")
        # A row ends with a real token, as `generate` pads.
        and (attention_mask is None or bool(attention_mask[:, -1].all()))
    )


def read(stack, embeds, attention_mask, position_ids, cache, last_only: bool) -> BaseModelOutputWithPast:
    """Return hidden states [B, L, D] of embeddings [B, L, D], zeros at padding, or of each row's last one [B, 1, D].

    attention_mask: [B, L], zeros at padding, or None. Fills the cache, with zeros at padding.
    """
    num_rows, length = embeds.shape[:2]
    real = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
    if real is None:
        hidden = embeds.reshape(1, -1, embeds.shape[2])
        positions = position_ids.expand(num_rows, length).reshape(1, -1)
        ends = [length * row for row in range(num_rows + 1)]
    else:
        hidden, positions = embeds[real][None], position_ids.expand(num_rows, length)[real][None]
        ends = [0, *real.sum(1).cumsum(0).tolist()]
    turns = stack.rotary_emb(hidden, position_ids=positions)  # cos and sin [1, T, Dh]

    def placed(states):
        """Return states [1, T, ...] as [B, L, ...]."""
        if real is None:
            return states.view(num_rows, length, *states.shape[2:])
        out = states.new_zeros(num_rows, length, *states.shape[2:])
        out[real] = states[0]
        return out

    last = [end - 1 for end in ends[1:]]
    for layer, past in zip(stack.layers, cache.layers, strict=True):
        rows = last if last_only and layer is stack.layers[-1] else None
        hidden = read_layer(layer, hidden, turns, ends, rows, past, placed)
    hidden = norm(stack.norm, hidden)
    hidden = hidden.transpose(0, 1) if last_only else placed(hidden)
    return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)


def read_layer(layer, hidden, turns, ends, rows, past, placed) -> torch.Tensor:
    """Return what a layer makes of hidden states [1, T, D]: all, or [1, B, D] of the positions `rows`."""
    attention, mlp = layer.self_attn, layer.mlp
    heads = (-1, attention.head_dim)
    normed = norm(layer.input_layernorm, hidden)
    query, key = attention.q_proj(normed).unflatten(-1, heads), attention.k_proj(normed).unflatten(-1, heads)
    value = attention.v_proj(normed).unflatten(-1, heads)  # [1, T, Hk, Dh]
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = rotate(query, key, *turns)
    past.update(placed(key).transpose(1, 2), placed(value).transpose(1, 2))
    if rows is not None:
        query, hidden = query[:, rows], hidden[:, rows]
    seen = attend_on_cpu(query[0], key[0], value[0], ends, attention.scaling, rows=rows)  # [T, H, Dh]
    hidden = hidden + attention.o_proj(seen.flatten(1)[None])
    normed = norm(layer.post_attention_layernorm, hidden)
    if not is_unobserved(mlp):
        return hidden + mlp(normed)
    return hidden + mlp.down_proj(swiglu(mlp.gate_proj(normed), mlp.up_proj(normed)))


def norm(module, hidden) -> torch.Tensor:
    """Return module(hidden) of an RMSNorm, in fewer passes where nobody listens to it."""
    if not isinstance(module, FastNorm) or not is_unobserved(module):
        return module(hidden)
    return rms_norm(hidden, module.weight, module.variance_epsilon)
