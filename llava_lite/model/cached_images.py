"""Note on a cache which images its sequences have, so that no call continues it without them, or with others.

With mm_injection adaption_prompt an image stands in no position of the text: a cache does not hold it, and each call
that continues the cache needs the image again. n sequences, N images, K prompts of a layer, D model width.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from transformers import Cache

logger = logging.getLogger(__name__)

# Our attribute of a cache. A copy of the cache has it too.
NOTE = "sequences_with_image"


class Note(NamedTuple):
    """Which of n sequences have an image, and the prompts [n, K, D] that the images made; None without any."""

    mask: tuple[bool, ...]
    prompts: torch.Tensor | None


def row_indices(image_rows):
    """Return the sequence [N] of each image; image_rows holds these, or is a mask [n] of the sequences with an image.

    None stays None. A mask is what the processor gives: masks of several calls can be put one after another.
    """
    if image_rows is None:
        return None
    rows = torch.as_tensor(image_rows)
    return rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows


def image_mask(num_samples: int, given, image_rows=None) -> tuple[bool, ...]:
    """Return for each of n sequences whether it has one of the images (or features) `given`; None for no image.

    image_rows: as `row_indices` returns them; None for an image of each.
    """
    if given is None or len(given) == 0:
        return (False,) * num_samples
    rows = range(num_samples) if image_rows is None else set(torch.as_tensor(image_rows).tolist())
    return tuple(i in rows for i in range(num_samples))


def check_images_again(cache, mask: tuple[bool, ...]) -> None:
    """Raise ValueError if sequences of a cache have images that the call which continues it does not bring.

    mask: which sequences of the call have an image. Warns of images that the cached positions were computed without.
    Batches of different sizes, as after beam search, are compared as wholes.
    """
    note = getattr(cache, NOTE, None)
    if note is None or note.mask == mask:
        return
    noted = note.mask
    if len(noted) != len(mask):
        noted, mask = ((any(one),) * len(mask) for one in (noted, mask))
    num_missing = sum(before and not now for before, now in zip(noted, mask, strict=True))
    num_late = sum(now and not before for before, now in zip(noted, mask, strict=True))
    # Last, as it may wait for the device. A cache that was reset holds nothing.
    num_cached = int(cache.get_seq_length()) if num_missing or num_late else 0
    if num_missing and num_cached:
        raise ValueError(
            f"{num_missing} of {len(mask)} cached sequences ({num_cached} positions) were computed with an image that "
            "this call does not bring. With mm_injection adaption_prompt a cache does not hold images: give the same "
            "images again, or their visual_prompts."
        )
    if num_late and num_cached:
        logger.warning(
            "%d of %d cached sequences have an image now that their %d positions were computed without: that text was "
            "read as text alone. Generate from all ids without the cache to have it read with the image.",
            *(num_late, len(mask), num_cached),
        )


def check_same_images(cache, prompts: torch.Tensor | None) -> None:
    """Raise ValueError if a cache was computed with other images than those whose prompts [n, K, D] are given now.

    Equal up to rounding, as an image may be encoded in a batch of another size. Of a batch of another size, as after
    beam search, each sequence must have an image of the cache.
    """
    note = getattr(cache, NOTE, None)
    if note is None or note.prompts is None or prompts is None or is_same(note.prompts, prompts):
        return
    if not int(cache.get_seq_length()):
        return
    shown = torch.tensor(note.mask, device=note.prompts.device)
    before, now = note.prompts, prompts.detach().to(note.prompts)
    if len(before) == len(now):
        num_other = int((differ(before, now) & shown).sum())
    else:
        num_other = int(differ(before[:, None], now).all(0).sum()) if all(note.mask) else 0
    if num_other:
        raise ValueError(
            f"{num_other} of {len(now)} cached sequences were computed with another image than this call brings. With "
            "mm_injection adaption_prompt every call that continues a cache needs the same images: give those again, "
            "or generate from all ids without the cache."
        )


def is_same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors are one: within `generate` every step brings the same prompts."""
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape and first.dtype == second.dtype


def differ(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return whether vectors [..., K, D] are further apart than rounding takes them, a bool for each K x D."""
    tolerance = relative_tolerance(first.dtype)
    first, second = first.float(), second.float()
    distance, length = ((one.square().sum((-2, -1))).sqrt() for one in (first - second, first))
    return distance > tolerance * length


def relative_tolerance(dtype: torch.dtype) -> float:
    """Return how far apart the features of one image may be, encoded in two batches, as a part of their length."""
    return max(4 * torch.finfo(dtype).eps, 1e-4)


def note_images(cache, mask: tuple[bool, ...], prompts: torch.Tensor | None = None) -> None:
    """Note on a cache (None: nothing to do) which of its sequences have an image, and the prompts of the images."""
    if cache is not None:
        setattr(cache, NOTE, Note(mask, None if prompts is None else prompts.detach()))


def find_cache(output):
    """Return the cache in the output of a decoder, an object or a tuple; None without one."""
    values = output if isinstance(output, tuple) else output.to_tuple()
    return next((value for value in values if isinstance(value, Cache)), None)
