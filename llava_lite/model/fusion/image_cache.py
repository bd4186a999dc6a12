"""Cache the vision tower's features of images, so that an image is encoded once for many questions."""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from threading import Lock

import torch


class ImageFeatureCache:
    """The tower's features of the most recent images; it belongs to the caller, and threads may share it.

        cache = ImageFeatureCache()
        colour = reply(model, processor, "What colour is it?", path, image_cache=cache)
        shape = reply(model, processor, "What shape has it?", path, image_cache=cache)

    For many questions about few images: a chat, a notebook, a benchmark with six questions an image. Features stay on
    the model's device. The tower's weights must not change while the cache is in use.
    """

    def __init__(self, num_images: int = 16):
        self.num_images = num_images
        self._known: OrderedDict = OrderedDict()
        self._lock = Lock()
        self._tower = None

    def features(self, model, images, image_sizes=None) -> torch.Tensor | list[torch.Tensor]:
        """Return `image_features` of `generate`: [N, P, C] of images [N, 3, H, W], else [n, P, C] of n crops each.

        model: its tower encodes the images that are not cached. Raises ValueError for a second model.
        """
        self._check_model(model)
        sizes = [None] * len(images) if image_sizes is None else [tuple(int(side) for side in s) for s in image_sizes]
        keys = [_fingerprint(image, size) for image, size in zip(images, sizes, strict=True)]
        with self._lock:
            known = {key: self._known[key] for key in keys if key in self._known}
        places = sorted({key: i for i, key in enumerate(keys) if key not in known}.values())
        if places:
            wanted = images[places] if isinstance(images, torch.Tensor) else [images[i] for i in places]
            encoded = model.tower_features(wanted, None if image_sizes is None else [sizes[i] for i in places])
            known |= {keys[i]: of_one for i, of_one in zip(places, encoded, strict=True)}
        self._keep(known, keys)
        each = [known[key] for key in keys]
        return torch.cat(each) if isinstance(images, torch.Tensor) and images.dim() == 4 else each

    def _keep(self, known: dict, keys: list) -> None:
        with self._lock:
            for key in keys:
                self._known[key] = known[key]
                self._known.move_to_end(key)
            while len(self._known) > self.num_images:
                self._known.popitem(last=False)

    def _check_model(self, model) -> None:
        tower = model.get_vision_tower()
        if tower is None:
            raise ValueError("images for a model that has no vision tower.")
        if self._tower is None:
            self._tower = weakref.ref(tower)
        if self._tower() is not tower:
            raise ValueError("an ImageFeatureCache holds the features of one model; make another for this one.")


def _fingerprint(image: torch.Tensor, size):
    """Return a key that identifies an image's tensor and its original size."""
    pixels = image.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(pixels.tobytes()).digest(), tuple(image.shape), image.dtype, size
