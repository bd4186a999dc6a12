"""Turn images, sounds, point clouds and more into the features of one image, for a model whose tower reads them.

ImageBind-LLM (Han et al. 2023, arXiv 2309.03905) is trained on images and answers about everything that ImageBind
puts into the space of images.
"""

from __future__ import annotations

import torch

from llava_lite.media.load import load_media
from llava_lite.model.fusion.media import embed_media
from llava_lite.model.mixing import mix_embeddings


@torch.no_grad()
def media_features(model, media: dict, feature_bank=None, **mixing) -> torch.Tensor:
    """Return the features [1, 1, C] that stand for one image, mixed from media of one or more kinds.

    media: kind ("image", "audio", "video", "text", "point", "depth", "thermal", "imu") to a path, the bytes of a file
    or a loaded sample as `load_media` returns it; or to [that, weight]. feature_bank: a FeatureBank, towards which the
    mixture is pulled; mixing: its top_k, temperature and weight, see mix_embeddings. Raises ValueError with the known
    ones for a kind that the tower does not read.
    """
    tower, known = model.get_vision_tower(), known_kinds(model)
    if not isinstance(media, dict):
        raise ValueError(f"media is a dict of kinds, such as {{'audio': 'bird.wav'}}; got {type(media).__name__}.")
    if not media:
        raise ValueError(f"media is empty; give one or more of {', '.join(known)}.")
    unknown = [kind for kind in media if kind not in known]
    if not unknown and not hasattr(tower, "encode"):
        raise ValueError("media are for a model with ImageBind as its tower; give this one its images as images.")
    if unknown:
        what = f"its tower is of model_type {tower.config.model_type!r}" if tower is not None else "it has no tower"
        raise ValueError(
            f"the model reads {', '.join(known) or 'text alone'} ({what}) and got {', '.join(unknown or media)}; "
            "media of other kinds need a model with ImageBind that was built with them."
        )
    mix = {}
    for kind, value in media.items():
        source, weight = read_weighted(kind, value)
        if not isinstance(source, torch.Tensor):
            source = load_media(kind, source, **tower.config.media_options(kind))
        mix[kind] = (source, float(weight))
    (parts,) = embed_media(tower, [mix])
    return mix_embeddings(parts, bank=feature_bank, **mixing)[:, None].to(tower.dtype)


def known_kinds(model) -> list[str]:
    """Return the kinds of media that a model reads, such as ["image"]; none for one that reads text alone."""
    tower = model.get_vision_tower()
    return list(getattr(getattr(tower, "config", None), "modalities", ["image"] if tower is not None else []))


def read_weighted(kind: str, value) -> tuple:
    """Return (source, weight) of what is given for a kind: a source, or [source, weight]."""
    if not isinstance(value, (list, tuple)):
        return value, 1.0
    if len(value) != 2 or not isinstance(value[1], (int, float)):
        raise ValueError(f"media {kind!r} is {value!r}; expected one source, or [source, weight] with a number.")
    return tuple(value)
