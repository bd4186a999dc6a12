"""Replace image placeholders by image features.

B batch, T tokens before, L after, N images, F features of all images, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llava_lite.constants import IGNORE_INDEX


@dataclass
class Batch:
    """Token-level inputs of one forward call; every field [B, L] or None."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    labels: torch.Tensor | None = None


def placeholder_mask(input_ids: torch.Tensor, image_token_index: int) -> torch.Tensor:
    """Return [B, T] bool, true at image placeholders: the config's or LLaVA's -200."""
    return (input_ids == image_token_index) | (input_ids == -200)


def expand_placeholders(
    batch: Batch, is_image: torch.Tensor, lengths: Sequence[int], pad_left: bool | None = None
) -> Batch:
    """Repeat each placeholder once for every feature of its image, and pad the sequences again.

    is_image: [B, T] bool. lengths: features of each image, in reading order. pad_left: side of the new padding;
    None keeps the side of the mask's padding (right if none). Labels are IGNORE_INDEX at images and padding. Returns a
    batch of [B, L]; `attention_mask` stays None if it was None and no sequence needs padding, `position_ids` likewise
    (else they count the real tokens from 0). Raises ValueError for a packed row, whose boundaries would move.
    """
    ids = batch.input_ids
    if batch.attention_mask is None and batch.position_ids is not None and (batch.position_ids.diff(dim=1) < 1).any():
        raise ValueError(
            "a row of several samples with one placeholder an image; packed rows need one placeholder a feature, as "
            "the examples of llava_lite.data.dataset have them."
        )
    real = torch.ones_like(ids, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask.bool()
    repeats = torch.ones_like(ids)
    repeats[is_image] = torch.as_tensor(lengths, dtype=ids.dtype, device=ids.device)
    repeats *= real  # [B, T]
    row_len = repeats.sum(1)  # [B]
    length = int(row_len.max())
    if pad_left is None:
        pad_left = bool((~real[:, 0]).any())
    columns = torch.arange(length, device=ids.device)
    filled = columns >= (length - row_len)[:, None] if pad_left else columns < row_len[:, None]  # [B, L]

    def spread(values: torch.Tensor, pad: int) -> torch.Tensor:
        out = values.new_full(filled.shape, pad)
        out[filled] = values.flatten().repeat_interleave(repeats.flatten())
        return out

    labels = batch.labels
    if labels is not None:
        labels = spread(labels.masked_fill(is_image, IGNORE_INDEX), IGNORE_INDEX)
    keep_mask = batch.attention_mask is not None or not bool((row_len == length).all())
    return Batch(
        input_ids=spread(ids, 0),
        attention_mask=filled.to(ids.dtype) if keep_mask else None,
        position_ids=positions_from_mask(filled) if batch.position_ids is not None else None,
        labels=labels,
    )


def positions_from_mask(mask: torch.Tensor) -> torch.Tensor:
    """Number the real tokens of each sequence from 0; padding gets 0. [B, L] -> [B, L]."""
    return (mask.long().cumsum(1) - 1) * mask.long()


def check_counts(num_placeholders: int, lengths: Sequence[int]) -> bool:
    """Return whether placeholders need expanding: True for one an image, False for one a feature.

    lengths: features of each image. Raises ValueError with the counts in any other case.
    """
    num_features = sum(lengths)
    if num_placeholders == num_features:
        return False
    if num_placeholders == len(lengths):
        return True
    each = f"{min(lengths)}" if min(lengths) == max(lengths) else f"{min(lengths)} to {max(lengths)}"
    raise ValueError(
        f"{num_placeholders} image placeholders in input_ids but {len(lengths)} images of {each} features "
        f"each; expected {len(lengths)} (one an image) or {num_features} (one a feature). "
        "Check that truncation did not cut an image and that every <image> has its file."
    )


def splice(text_embeds: torch.Tensor, is_image: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Write features [F, D] over the embeddings [B, L, D] where `is_image` [B, L] is true, in reading order.

    Features beyond the number of positions are not written and get a gradient of zero: that keeps the tower and the
    connector in the graph on a rank whose batch has text only.
    """
    # A device map may put tower, connector and embeddings on different devices.
    is_image, features = is_image.to(text_embeds.device), features.to(text_embeds.device, text_embeds.dtype)
    return text_embeds.masked_scatter(is_image[..., None], features)


def cut_rows(batch: Batch, embeds: torch.Tensor, max_length: int | None) -> tuple[Batch, torch.Tensor]:
    """Return the batch and its embeddings [B, L, D] with at most the first max_length tokens of each sequence.

    Padding stays on its side.
    """
    ids = batch.input_ids
    real = torch.ones_like(ids, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask.bool()
    if max_length is None or int(real.sum(1).max()) <= max_length:
        return batch, embeds
    kept = real & (real.cumsum(1) <= max_length)  # [B, L]
    pad_left = bool((~real[:, 0]).any())
    # Stable, so that tokens stay in order; dropped tokens go to the side of the padding.
    order = kept.int().argsort(dim=1, descending=not pad_left, stable=True)
    order = order[:, -max_length:] if pad_left else order[:, :max_length]

    def select(values):
        return None if values is None else values.gather(1, order)

    return Batch(
        input_ids=select(ids),
        attention_mask=select(batch.attention_mask),
        position_ids=select(batch.position_ids),
        labels=select(batch.labels),
    ), embeds.gather(1, order.to(embeds.device)[..., None].expand(-1, -1, embeds.shape[2]))
