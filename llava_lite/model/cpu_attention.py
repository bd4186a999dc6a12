"""Attend causally inside the samples of packed rows on the CPU, by batched products over blocks of queries.

torch's own kernel for the CPU (scaled_dot_product_attention) works tile by tile at a quarter of the speed of a
product. Here a block of queries meets all its keys at once; scores are made in both passes and never kept. Float32
throughout, the same sums in another order.

T tokens of all samples, S queries (every token, or some), H heads, Hkv heads of keys, G queries' heads a key's head,
Dh width of a head, q queries of a block, k keys that it meets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from threading import Lock
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from llava_lite.model.products import has_wide_vectors, takes_onednn

# Queries of a block: a block meets no key behind its last query, so nearly half of a sample is never computed. Of 64,
# 128, 256 and 512 the quickest with samples of 300 tokens.
BLOCK = 128


def attends_here(*tensors, dropout=0.0) -> bool:
    """Return whether `attend_on_cpu` takes these: float32 on the CPU, nothing dropped, no graph being traced."""
    plain = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    return plain and not dropout and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


def attend_on_cpu(query, key, value, ends, scaling=None, window=None, rows=None) -> torch.Tensor:
    """Return what the queries [S, H, Dh] see of key and value [T, Hkv, Dh], as [S, H, Dh].

    ends: list of where samples begin, and the end of the last. scaling: of the scores, default Dh**-0.5. window: how
    many keys a query sees, its own included; None for all before it. rows: where among T the queries stand, list in
    ascending order; None if every token asks.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _Attention.apply(query, key, value, (ends, rows, window), scaling)


class Block(NamedTuple):
    """Queries that meet their keys together."""

    queries: slice  # of S
    keys: slice  # of T
    # What is added to the scores of the last keys: -inf [q, those] where a query must not see one, else 0; every query
    # sees the keys before them.
    hidden: torch.Tensor

    @property
    def is_common(self) -> bool:
        """Whether many samples have a block of this shape: a whole one, and whole ones before it."""
        num_queries, num_keys = self.queries.stop - self.queries.start, self.keys.stop - self.keys.start
        return num_queries == BLOCK and num_keys % BLOCK == 0


def plan_blocks(ends, rows=None, window=None) -> Iterator[Block]:
    """Yield the blocks of queries, sample by sample."""
    done = 0
    for start, stop in pairwise(ends):
        asking = range(start, stop)
        # In a sample no longer than the window every query sees all before it.
        reach = None if window is None or window >= stop - start else window
        if rows is not None:
            asking = [row for row in rows[done : done + stop - start] if row < stop]
        for first in range(0, len(asking), BLOCK):
            positions = asking[first : first + BLOCK]
            low = start if reach is None else max(start, positions[0] - reach + 1)
            keys = slice(low, positions[-1] + 1)
            queries = slice(done + first, done + first + len(positions))
            yield Block(queries, keys, hidden_keys(positions, low, reach))
        done += len(asking)


def hidden_keys(positions, low: int, window: int | None) -> torch.Tensor:
    """Return -inf where the queries at `positions` must not see a key, from the first that is hidden from any."""
    at = torch.tensor(positions, device="cpu")[:, None]
    keys = torch.arange(low if window is not None else positions[0] + 1, positions[-1] + 1, device="cpu")[None]
    hidden = keys > at if window is None else (keys > at) | (keys <= at - window)
    # Adding is quicker than filling where a mask says so.
    return torch.zeros(hidden.shape, dtype=torch.float32, device="cpu").masked_fill_(hidden, float("-inf"))


class _Attention(torch.autograd.Function):
    """Keeps queries, keys and values; blocks and their masks are planned once more for the gradient."""

    @staticmethod
    def forward(ctx, query, key, value, plan, scaling):
        """Return the states; plan: (ends, rows, window) of `attend_on_cpu`."""
        ctx.save_for_backward(query, key, value)
        ctx.plan, ctx.scaling = plan, scaling
        out = query.new_zeros(query.shape)
        for block in plan_blocks(*plan):
            with quick_products(block):
                asking = rows_of(query, block, key.shape[1]).mul(scaling)
                seen = torch.bmm(probabilities(asking, keys_of(key, block), block.hidden), keys_of(value, block))
                out[block.queries].copy_(by_token(seen, out.shape[1]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value = ctx.saved_tensors
        num_heads, num_key_heads = query.shape[1], key.shape[1]
        d_query = query.new_zeros(query.shape)
        # Head by head in memory, where a block adds to them.
        d_key, d_value = (key.new_zeros(num_key_heads, *key.shape[::2]) for _ in range(2))  # [Hkv, T, Dh]
        for block in plan_blocks(*ctx.plan):
            with quick_products(block):
                keys, values = keys_of(key, block), keys_of(value, block)
                asking = rows_of(query, block, num_key_heads).mul(ctx.scaling)
                told = rows_of(grad, block, num_key_heads).contiguous()
                seen = probabilities(asking, keys, block.hidden)  # [Hkv, G * q, k]
                d_value[:, block.keys] += torch.bmm(seen.transpose(1, 2), told)
                d_seen = torch.bmm(told, values.transpose(1, 2))
                d_scores = torch._softmax_backward_data(d_seen, seen, -1, seen.dtype)
                d_key[:, block.keys] += torch.bmm(d_scores.transpose(1, 2), asking)
                d_query[block.queries].copy_(by_token(torch.bmm(d_scores, keys).mul_(ctx.scaling), num_heads))
        return d_query, d_key.transpose(0, 1), d_value.transpose(0, 1), None, None


def keys_of(states, block: Block) -> torch.Tensor:
    """Return the block's keys or values of [T, Hkv, Dh] as [Hkv, k, Dh] in one piece, as products want them."""
    return states[block.keys].transpose(0, 1).contiguous()


def rows_of(states, block: Block, num_key_heads: int) -> torch.Tensor:
    """Return the block's queries of [S, H, Dh], those of heads with the same keys in one matrix: [Hkv, G * q, Dh]."""
    states = states[block.queries].transpose(0, 1)  # [H, q, Dh]
    return states.reshape(num_key_heads, -1, states.shape[-1])


def by_token(states, num_heads: int) -> torch.Tensor:
    """Return states [Hkv, G * q, Dh] as [q, H, Dh]."""
    return states.view(num_heads, -1, states.shape[-1]).transpose(0, 1)


def probabilities(asking, keys, hidden) -> torch.Tensor:
    """Return how much each of the queries [Hkv, G * q, Dh], scaled, sees of the keys [Hkv, k, Dh]."""
    scores = torch.bmm(asking, keys.transpose(1, 2))
    if hidden.shape[1]:
        scores.view(-1, len(hidden), scores.shape[-1])[..., -hidden.shape[1] :].add_(hidden)
    return scores.softmax(dim=-1)


# The precision that was set before, once for each thread that is in `quick_products`.
_LOCK, _FOUND = Lock(), []


@contextmanager
def quick_products(block: Block):
    """Let oneDNN make a block's batched float32 products where it makes them in float32, and sooner than BLAS.

    It makes a kernel for every shape that it meets, milliseconds and megabytes each; so only where shapes come again.
    """
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if not block.is_common or not takes_onednn() or not _onednn_is_exact():
        yield
        return
    with _LOCK:
        # torch asks oneDNN for them only if bfloat16 would be allowed, of which it makes no use without matrix tiles.
        # The setting is the process's: of threads that answer at once the last gives back what the first has found.
        # What others multiply meanwhile stays float32, in another order of its sums.
        _FOUND.append(_FOUND[0] if _FOUND else settings.fp32_precision)
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        with _LOCK:
            before = _FOUND.pop()
            if not _FOUND:
                settings.fp32_precision = before


@cache
def _onednn_is_exact() -> bool:
    """Return whether this processor's batched products stay float32 under the permission; tried, not believed."""
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)()
    if has_tiles or not hasattr(settings, "fp32_precision") or not has_wide_vectors():
        return False
    generator = torch.Generator().manual_seed(0)
    left, right = torch.rand(2, 2, 256, 256, generator=generator, dtype=torch.float32, device="cpu")
    exact = left.double() @ right.double()
    with _LOCK:
        before = settings.fp32_precision
        settings.fp32_precision = "bf16"
        try:
            # Sums of 256 numbers below 1: float32 is off by 1e-5 of them, bfloat16 by 1e-2.
            return bool((left @ right - exact).abs().max() < 1e-3)
        finally:
            settings.fp32_precision = before
