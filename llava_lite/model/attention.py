"""Choose the attention function, and run variable-length attention on batches with padding.

B batch, H heads, L positions, K cached positions, Dh width of a head.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

logger = logging.getLogger(__name__)

CHOICES = ("auto", "flash_attention_2", "varlen", "sdpa", "eager")


def choose_attention(name: str | None, device: str | None = None) -> str:
    """Return the attention implementation that transformers is given.

    name: one of CHOICES or a name that transformers knows; None and "auto" take the best that is installed for the
    device ("cuda" if there is one): flash-attn, else torch's varlen kernel, else sdpa. The choice is logged.
    """
    if name not in (None, "auto"):
        return name
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = "sdpa"
    if device == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        if importlib.util.find_spec("flash_attn") is not None:
            chosen = "flash_attention_2"
        elif find_varlen_kernel() is not None:
            chosen = "varlen"
    logger.info("attention: %s (chosen for %s)", chosen, device)
    return chosen


def find_varlen_kernel():
    """Return torch's `varlen_attn` or None; it needs torch >= 2.10, CUDA, compute capability 8.0, half precision."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def window_arguments(kernel, window: int | None) -> dict:
    """Return how this version of `varlen_attn` is told to be causal: `is_causal` in 2.10, a window from 2.11 on.

    window: how many keys a query sees, its own included; None for all before it.
    """
    left = -1 if window is None else window - 1
    if "window_size" in inspect.signature(kernel).parameters:
        return {"window_size": (left, 0)}
    if window is not None:
        raise ValueError(f"sliding_window {window} needs a torch whose varlen_attn takes window_size; use sdpa.")
    return {"is_causal": True}


def varlen_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, sliding_window=None, **kwargs
) -> tuple[torch.Tensor, None]:
    """Attend within each row's real tokens, without computing padding.

    query [B, H, L, Dh]; key, value [B, Hkv, K, Dh]; attention_mask: [B, positions seen] bool (True is real) or None.
    Returns [B, L, H, Dh] with zeros at padding. Decoding steps, dropout and attention that is not causal go to SDPA.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    if query.shape[2] != key.shape[2] or not causal or dropout:
        # A tower sees every key, and SDPA is quickest where no mask says so.
        sees_all = not causal and attention_mask is None and sliding_window is None
        allowed = None if sees_all else allowed_keys(query, key, attention_mask, causal, sliding_window)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout, scale=scaling)
        return out.nan_to_num().transpose(1, 2), None
    real = attention_mask
    if real is None:
        real = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
    packed = [t.transpose(1, 2)[real] for t in (query, key, value)]  # [tokens, H, Dh]
    packed_out = attend_segments(*packed, real.sum(1), scaling, sliding_window)
    out = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    out[real] = packed_out
    return out, None


def attend_segments(query, key, value, lengths, scaling=None, window: int | None = None) -> torch.Tensor:
    """Attend causally inside each segment of packed tokens [tokens, H, Dh]; `lengths` [segments] sum to tokens.

    On CUDA in half precision one kernel serves all segments; elsewhere SDPA runs once a segment.
    """
    kernel = find_varlen_kernel()
    if query.is_cuda and kernel is not None and query.dtype in (torch.float16, torch.bfloat16):
        ends = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(lengths.max())
        scale = {} if scaling is None else {"scale": scaling}
        return kernel(query, key, value, ends, ends, longest, longest, **window_arguments(kernel, window), **scale)
    parts = []
    for q, k, v in zip(*(t.split(lengths.tolist()) for t in (query, key, value)), strict=True):
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # [1, H, n, Dh]
        mask = allowed_keys(q, k, None, True, window) if window is not None else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def allowed_keys(query, key, mask, causal: bool, window: int | None) -> torch.Tensor:
    """Return which keys each query may see, bool [B or 1, 1, L, K].

    mask: [B, positions seen] or None (all K seen); the queries are the last of them. A static cache has more keys than
    positions seen.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    seen = num_keys if mask is None else mask.shape[1]
    rows = torch.arange(seen - num_queries, seen, device=query.device)[:, None]
    columns = torch.arange(num_keys, device=query.device)[None]
    allowed = columns < seen if not causal else columns <= rows
    if window is not None:
        allowed = allowed & (columns > rows - window)
    allowed = allowed.expand(num_queries, num_keys)[None, None]
    if mask is not None:
        allowed = allowed & F.pad(mask.bool(), (0, num_keys - seen))[:, None, None]
    return allowed


def keep_padding_mask(batch_size, q_length, kv_length, q_offset=0, attention_mask=None, device=None, **kwargs):
    """Return the padding mask [B, positions seen] for `varlen_attention`, which reads no 4-D mask.

    None if nothing is padded and every key is seen; a static cache has keys that nobody wrote yet.
    """
    seen = int(q_offset) + q_length
    if attention_mask is None:
        return None if seen >= kv_length else torch.ones(batch_size, seen, dtype=torch.bool, device=device)
    return attention_mask[:, -kv_length:].bool()


AttentionInterface.register("varlen", varlen_attention)
AttentionMaskInterface.register("varlen", keep_padding_mask)
