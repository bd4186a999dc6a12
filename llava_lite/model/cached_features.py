"""Note on a cache the features of images in its positions, so that no call continues it with other images in silence.

`generate` may be given the images of all ids again; those of cached positions are in the cache and are not read. B
sequences, L positions, F features of images, D model width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llava_lite.model.cached_images import relative_tolerance

# Our attribute of a cache. A copy of the cache has it too.
NOTE = "features_of_images"


class Note(NamedTuple):
    """Where features stand [B, L], the features [F, D] in reading order, and of which positions [L] that is known."""

    is_image: torch.Tensor
    features: torch.Tensor
    is_known: torch.Tensor


def check_cached_features(cache, is_image: torch.Tensor, features: torch.Tensor, num_cached: int) -> None:
    """Raise ValueError if the images of cached positions are others than those that the cache was computed with.

    is_image: [B, L] of all ids. features: [F, D] of them. Equal up to rounding, as an image may be encoded in a batch
    of another size. Without a placeholder in a cached position the call brings no image of it.
    """
    note = get_note(cache, is_image)
    if note is None:
        return
    is_known = note.is_known[:num_cached]
    before, now = within(note.is_image, is_known), within(is_image, is_known)
    if not bool(now.any()):
        return
    width = len(is_known)
    is_other = (before[:, :width] != now[:, :width]).any(1)
    if not bool(is_other.any()):
        first = note.features[before[note.is_image]].float()
        second = features[now[is_image].to(features.device)].to(first)
        rows, zeros = now.nonzero()[:, 0].to(first.device), first.new_zeros(len(now))
        distance, size = (zeros.index_add(0, rows, one.square().sum(-1)) for one in (first - second, first))
        is_other = distance > relative_tolerance(note.features.dtype) ** 2 * size
    if num_other := int(is_other.sum()):
        raise ValueError(
            f"{num_other} of {len(is_image)} cached sequences were computed with other images than this call brings "
            "for them, which would not be read. Give the images of before, or those of the new ids alone; or generate "
            "from all ids without the cache."
        )


def note_features(cache, is_image: torch.Tensor, embeds: torch.Tensor, num_cached: int) -> None:
    """Note on a cache (None: nothing to do) the images in the embeddings [B, L, D] of a call, after its num_cached.

    is_image: [B, L]. Of the cached positions it knows what was noted before.
    """
    if cache is None:
        return
    is_known = torch.ones_like(is_image[0])
    is_known[:num_cached] = False
    is_image = within(is_image, is_known)
    features = embeds
    if num_cached and (note := get_note(cache, is_image)) is not None:
        is_old = note.is_known[:num_cached]
        is_known[: len(is_old)] = is_old
        before = within(note.is_image, is_old)
        is_image[:, : len(is_old)] = before[:, : len(is_old)]
        features = embeds.clone()
        cached = features[:, : len(is_old)]
        cached[before[:, : len(is_old)]] = note.features[before[note.is_image]]
    setattr(cache, NOTE, Note(is_image, features[is_image].detach(), is_known))


def get_note(cache, is_image: torch.Tensor) -> Note | None:
    """Return the note of a cache on the device of is_image [B, L]; None without one of B sequences."""
    note = getattr(cache, NOTE, None)
    if note is None or len(note.is_image) != len(is_image):
        return None
    return note._replace(is_image=note.is_image.to(is_image.device), is_known=note.is_known.to(is_image.device))


def within(is_image: torch.Tensor, is_known: torch.Tensor) -> torch.Tensor:
    """Return is_image [B, L], false where is_known [at most L] is false or ends."""
    kept = torch.zeros_like(is_image)
    kept[:, : len(is_known)] = is_image[:, : len(is_known)] & is_known
    return kept
