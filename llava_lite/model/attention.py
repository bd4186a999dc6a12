"""Choose the attention function, and attend sample by sample: in packed rows, and in batches with padding.

A packed row holds several samples in sequence; `cu_seq_lens_q`, flash attention's name, holds their boundaries. B
batch, H heads, Hkv key heads, G query heads per key head, L positions, K cached positions, Dh width of a
head, n tokens of a sample.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

logger = logging.getLogger(__name__)

CHOICES = ("auto", "flash_attention_2", "varlen", "sdpa", "eager")


def choose_attention(name: str | None, device: str | None = None, packed: bool = False) -> str:
    """Return the name of the attention implementation for transformers.

    name: one of CHOICES or a name that transformers knows; None and "auto" choose the best that is installed for the
    device ("cuda" if there is one): flash-attn, else torch's varlen kernel, else sdpa. packed: rows will hold several
    samples, for which varlen is chosen instead of sdpa; sdpa is exact too, with a mask of the row length squared. The
    choice is logged.
    """
    if name not in (None, "auto"):
        return name
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = "varlen" if packed else "sdpa"
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
    """Return the argument that makes this version of `varlen_attn` causal: `is_causal` in 2.10, a window since 2.11.

    window: number of keys that a query sees, its own included; None for all before it.
    """
    left = -1 if window is None else window - 1
    if "window_size" in inspect.signature(kernel).parameters:
        return {"window_size": (left, 0)}
    if window is not None:
        raise ValueError(f"sliding_window {window} needs a torch whose varlen_attn takes window_size; use sdpa.")
    return {"is_causal": True}


def varlen_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    is_causal=None,
    sliding_window=None,
    cu_seq_lens_q=None,
    max_length_q=None,
    position_ids=None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend within each sample of a packed row, or within each row's real tokens, without computing padding.

    query [B, H, L, Dh]; key, value [B, Hkv, K, Dh]; attention_mask: None, [B, L] bool (True is real), or the mask
    [B, 1, L, K] that `varlen_mask` makes for queries with a cache. cu_seq_lens_q: start of each sample of a packed row
    and the row's end, int [samples + 1]; max_length_q: length of the longest. Returns ([B, L, H, Dh], None), zeros at
    padding. With a cache, with a given mask, and where attention is not causal, SDPA computes as in transformers.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if cu_seq_lens_q is None and attention_mask is None and causal and query.shape[2] == key.shape[2] > 1:
        # Layers that pass positions alone: transformers' own, outside our models.
        found = find_segments(position_ids, len(query))
        cu_seq_lens_q, max_length_q = found.get("cu_seq_lens_q"), found.get("max_length_q")
    if cu_seq_lens_q is not None and causal:
        if query.shape[2] != key.shape[2]:
            raise ValueError(
                f"a packed row of {query.shape[2]} queries and {key.shape[2]} keys: packed rows cannot have a cache; "
                "pass use_cache=False, or one sample a row."
            )
        rows = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]  # [B * L, H, Dh], a view
        out = attend_segments(*rows, cu_seq_lens_q, max_length_q, scaling, sliding_window, dropout)
        return out.unflatten(0, query.shape[::2]), None
    if attention_mask is None and causal and sliding_window is not None and 1 < query.shape[2] == key.shape[2]:
        # `varlen_mask` made no mask for the window either.
        attention_mask = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
    if attention_mask is None or attention_mask.dim() != 2 or not causal:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    packed = [t.transpose(1, 2)[attention_mask] for t in (query, key, value)]  # [tokens, H, Dh]
    ends = get_ends(attention_mask.sum(1))
    packed_out = attend_segments(*packed, ends, None, scaling, sliding_window, dropout)
    out = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    out[attention_mask] = packed_out
    return out, None


def find_segments(position_ids: torch.Tensor | None, num_rows: int) -> dict:
    """Return the boundaries of samples in rows whose positions [B or 1, L] start again, for attention; {} if none do.

    For a caller who packs rows and gives positions alone, as transformers allows.
    """
    if position_ids is None or torch.compiler.is_compiling():
        return {}
    position_ids = position_ids.expand(num_rows, -1)
    starts = position_ids.diff(dim=1, prepend=position_ids[:, :1]) != 1  # [B, L], and each row's first
    if int(starts.sum()) == len(position_ids):
        return {}
    first = starts.flatten().nonzero().squeeze(1)
    ends = F.pad(first, (0, 1), value=position_ids.numel()).to(torch.int32)
    longest = int(ends.diff().max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def get_ends(lengths: torch.Tensor) -> torch.Tensor:
    """Return the start of each segment of these lengths and the end of the last, int32 [segments + 1]."""
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def repeat_heads(keys: torch.Tensor, num_heads: int, dim: int = 1) -> torch.Tensor:
    """Return keys or values, each head repeated for every query head that uses it."""
    groups = num_heads // keys.shape[dim]
    return keys.repeat_interleave(groups, dim=dim) if groups > 1 else keys


def attend_segments(query, key, value, ends, longest=None, scaling=None, window=None, dropout=0.0) -> torch.Tensor:
    """Attend causally inside each segment of packed tokens, query [tokens, H, Dh], key and value [tokens, Hkv, Dh].

    ends: int32 [segments + 1], 0 first; longest: tokens of the longest segment, read from the device if None. On CUDA
    in half precision one kernel runs all segments without waiting for the device; elsewhere SDPA runs once a segment.
    """
    kernel = find_varlen_kernel()
    if query.is_cuda and kernel is not None and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
        longest = int(ends.diff().max()) if longest is None else longest
        return run_kernel(kernel, query, key, value, ends.to(torch.int32), longest, scaling, window)
    lengths = ends.diff().tolist()
    segments = zip(*(t.split(lengths) for t in (query, key, value)), strict=True)
    # One split and one cat: faster than writing into a buffer, and each is the other's backward pass.
    return torch.cat([attend_segment(*segment, scaling, window, dropout) for segment in segments])


def run_kernel(kernel, query, key, value, ends, longest: int, scaling, window) -> torch.Tensor:
    """Return the output of a `varlen_attn` of any version for packed tokens; shapes as in attend_segments."""
    options = window_arguments(kernel, window) | ({} if scaling is None else {"scale": scaling})
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in inspect.signature(kernel).parameters:
            options["enable_gqa"] = True
        else:
            key, value = (repeat_heads(t, query.shape[1], dim=1) for t in (key, value))
    return kernel(query, key, value, ends, ends, longest, longest, **options)


def attend_segment(query, key, value, scaling=None, window=None, dropout=0.0) -> torch.Tensor:
    """Attend causally in one sample by SDPA: query [n, H, Dh], key and value [n, Hkv, Dh] -> [n, H, Dh]."""
    length, num_heads, width = query.shape
    groups = num_heads // key.shape[1]
    # Query heads of one key head form a batch over expanded keys, without a copy; SDPA's own grouping copies keys.
    query = query.view(length, -1, groups, width).permute(2, 1, 0, 3)  # [G, Hkv, n, Dh]
    key, value = (t.transpose(0, 1).expand(groups, -1, -1, -1) for t in (key, value))
    # A sample no longer than the window needs no mask.
    mask = None if window is None or window >= length else window_mask(length, window, query.device)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling
    )
    return out.permute(2, 1, 0, 3).reshape(length, num_heads, width)


def window_mask(length: int, window: int, device) -> torch.Tensor:
    """Return the keys that each query of a sample sees: itself and the window - 1 before it, bool [n, n]."""
    rows = torch.arange(length, device=device)[:, None]
    columns = torch.arange(length, device=device)[None]
    return (columns <= rows) & (columns > rows - window)


def varlen_mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, attention_mask=None, **kwargs):
    """Return the mask that `varlen_attention` reads; a function of transformers' AttentionMaskInterface.

    Without a cache and without a mask function of the caller: the padding mask [B, L] unchanged. Else the mask of
    SDPA [B, 1, L, K].
    """
    is_all = isinstance(q_offset, int) and q_offset == 0 == kv_offset and q_length == kv_length > 1
    if is_all and not kwargs.get("use_vmap") and not torch.compiler.is_compiling():
        return attention_mask
    return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, **kwargs)


AttentionInterface.register("varlen", varlen_attention)
AttentionMaskInterface.register("varlen", varlen_mask)
