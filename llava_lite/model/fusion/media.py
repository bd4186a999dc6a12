"""Turn media that stand for images, sound and points among them, into the tower's features of these images.

N images, C tower width; the other letters are those of a sample as llava_lite.media.load makes it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from llava_lite.imagebind_config import BRANCHES
from llava_lite.model.mixing import mix_embeddings

# {kind: (sample, weight)} of one image.
Mix = Mapping[str, tuple[torch.Tensor, float]]


def has_mixes(images) -> bool:
    """Return whether some images are media, {kind: (sample, weight)}, and not pixels."""
    return isinstance(images, (list, tuple)) and any(isinstance(image, Mapping) for image in images)


def features_of(tower, images: Sequence[torch.Tensor | Mix]) -> torch.Tensor:
    """Return the tower's features [N, 1, C] of images, in their order, in the tower's dtype.

    images: pixels [3, H, W] or [1, 3, H, W], or {kind: (sample, weight)}. Raises ValueError for a tower without
    `encode` and for several crops of an image.
    """
    if not hasattr(tower, "encode"):
        raise ValueError("some images are media, which are for a model with ImageBind as its tower.")
    features: list = [None] * len(images)
    plain = [i for i, image in enumerate(images) if not isinstance(image, Mapping)]
    for i, feature in zip(plain, _encode_pixels(tower, [images[i] for i in plain]), strict=True):
        features[i] = feature
    mixes = [i for i, image in enumerate(images) if isinstance(image, Mapping)]
    for i, feature in zip(mixes, mix_media(tower, [images[i] for i in mixes]), strict=True):
        features[i] = feature[None]
    joined = torch.stack([feature.to(tower.dtype) for feature in features])
    kinds = {kind for i in mixes for kind in images[i]}
    if not plain and all(BRANCHES.get(kind) != "vision" for kind in kinds) and _trains(tower):
        # Every rank must reduce the gradients of the branch of images, which is the only one that trains.
        joined = joined + 0 * tower(_empty_image(tower)).to(joined.device)
    return joined


def _encode_pixels(tower, images: list[torch.Tensor]) -> torch.Tensor:
    pixels = [image[None] if image.dim() == 3 else image for image in images]
    if any(len(crops) != 1 for crops in pixels):
        raise ValueError(
            "an image of several crops stands in a batch with media, which are one image each; set "
            "image_aspect_ratio to square."
        )
    # By dtype, since bytes are normalised by the tower and floats are normalised already.
    if len({crop.dtype for crop in pixels}) > 1:
        return torch.cat([tower(crop) for crop in pixels])
    return tower(torch.cat(pixels)) if pixels else torch.empty(0)


def mix_media(tower, mixes: Sequence[Mix]) -> list[torch.Tensor]:
    """Return the features [C] of media, in the tower's dtype: of each mix the embeddings, mixed by their weights."""
    return [mix_embeddings(parts)[0].to(tower.dtype) for parts in embed_media(tower, mixes)]


def embed_media(tower, mixes: Sequence[Mix]) -> list[dict[str, tuple[torch.Tensor, float]]]:
    """Return {kind: (embedding [1, C], weight)} of each mix, for mix_embeddings.

    Samples of one kind and one shape are encoded together.
    """
    groups = defaultdict(list)
    for i, mix in enumerate(mixes):
        for kind, (sample, _) in mix.items():
            groups[kind, tuple(sample.shape)].append(i)
    parts = [dict.fromkeys(mix) for mix in mixes]
    for (kind, _), members in groups.items():
        embeddings = tower.encode(kind, torch.stack([mixes[i][kind][0] for i in members]))
        for i, embedding in zip(members, embeddings.split(1), strict=True):
            parts[i][kind] = (embedding, float(mixes[i][kind][1]))
    return parts


def _trains(tower) -> bool:
    return torch.is_grad_enabled() and any(param.requires_grad for param in tower.parameters())


def _empty_image(tower) -> torch.Tensor:
    return torch.zeros(1, 3, tower.image_size, tower.image_size, device=tower.device, dtype=tower.dtype)
