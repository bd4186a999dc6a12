"""Keep the keys and values of past positions in buffers with room at the end, so that a step copies one position.

transformers' own dynamic cache joins the old positions and the new one into a fresh tensor at every layer and step:
at size S (see benchmarks/generation.py) with eight rows that copy was a third of a step's time.

B rows, H heads, K positions that are filled, R positions that there is room for, Dh width of a head.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Room is made for half as many positions again, and for this many at least.
LEAST_ROOM = 64


class Rows:
    """A buffer [B, H, R, Dh] of which the first K positions are filled."""

    def __init__(self, buffer: torch.Tensor):
        self.buffer = buffer
        # transformers starts a layer with a tensor of no dimensions to speak of.
        self.length = buffer.shape[-2] if buffer.dim() == 4 else 0

    @property
    def filled(self) -> torch.Tensor:
        """The filled positions [B, H, K, Dh], a view."""
        return self.buffer[:, :, : self.length] if self.buffer.dim() == 4 else self.buffer

    def append(self, states: torch.Tensor) -> torch.Tensor:
        """Add states [B, H, n, Dh] and return all filled positions."""
        end = self.length + states.shape[-2]
        # What inference mode has made nobody may write into after it.
        is_closed = self.buffer.is_inference() and not torch.is_inference_mode_enabled()
        if self.buffer.dim() != 4 or end > self.buffer.shape[-2] or is_closed:
            shape = (*states.shape[:2], end + max(LEAST_ROOM, end // 2), states.shape[3])
            buffer = states.new_empty(shape)
            if self.length:
                buffer[:, :, : self.length] = self.filled
            self.buffer = buffer
        self.buffer[:, :, self.length : end] = states
        self.length = end
        return self.filled

    def reorder(self, order: torch.Tensor) -> None:
        """Let row i be what row order[i] was."""
        buffer = self.buffer.new_empty((len(order), *self.buffer.shape[1:]))
        torch.index_select(self.filled, 0, order.to(self.buffer.device), out=buffer[:, :, : self.length])
        self.buffer = buffer


class GrowingLayer(DynamicLayer):
    """One layer's keys and values; whatever is assigned to `keys` or `values` becomes a full buffer."""

    @property
    def keys(self):
        """The filled keys [B, H, K, Dh], None before the first."""
        return None if self.key_rows is None else self.key_rows.filled

    @keys.setter
    def keys(self, tensor):
        self.key_rows = None if tensor is None else Rows(tensor)

    @property
    def values(self):
        """The filled values [B, H, K, Dh], None before the first."""
        return None if self.value_rows is None else self.value_rows.filled

    @values.setter
    def values(self, tensor):
        self.value_rows = None if tensor is None else Rows(tensor)

    def update(self, key_states, value_states, *args, **kwargs):
        """Add states [B, H, n, Dh] and return all keys and values."""
        if torch.is_grad_enabled():
            # A buffer that is written again would take the values away that the backward pass of queries needs too.
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.key_rows.append(key_states), self.value_rows.append(value_states)

    def get_seq_length(self) -> int:
        """Return how many positions are filled."""
        return self.key_rows.length if self.is_initialized and self.key_rows is not None else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; their room stays. Counts below zero, as transformers gives them."""
        if tokens_to_remove > 0:
            # What transformers of this version does with it: an error, or the length that shall stay.
            super().crop(tokens_to_remove)
        elif self.get_seq_length():
            for rows in (self.key_rows, self.value_rows):
                rows.length = max(0, rows.length + tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        self.key_rows = self.value_rows = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let row i be what row beam_idx[i] was, as beams go on."""
        if self.get_seq_length():
            self.key_rows.reorder(beam_idx)
            self.value_rows.reorder(beam_idx)


class GrowingCache(DynamicCache):
    """A DynamicCache whose full-attention layers are GrowingLayers; the others stay transformers' own."""

    def __init__(self, config):
        super().__init__(config=config)
        give_room(self)


def give_room(cache) -> None:
    """Replace the layers of an empty DynamicCache that keep all positions by GrowingLayers."""
    if isinstance(cache, DynamicCache) and not cache.offloading:
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
