"""Read the media of a record (sound, video, points and more, each with a weight), which together are one image."""

import difflib
import sys
from collections.abc import Iterator
from typing import NamedTuple

from llava_lite.data.errors import DataError
from llava_lite.data.records.image_values import describe
from llava_lite.data.records.keys import IMAGE_KEYS, MEDIA_KEYS, WEIGHT_KEYS, rewriting

KINDS = ("image", *MEDIA_KEYS)


class MediaPart(NamedTuple):
    """A file of a record: its kind (`image` or one of MEDIA_KEYS), its path below the image folder, its weight."""

    kind: str
    path: str
    weight: float = 1.0


class MediaMix(NamedTuple):
    """The media that stand for one image of a record, mixed by their weights; see mix_embeddings."""

    parts: tuple[MediaPart, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the parts, each once."""
        return tuple(part.kind for part in self.parts)

    def item(self) -> dict:
        """Return the keys of a record that are read as this mix; a weight of 1 has none, if there are others."""
        item = {part.kind: part.path for part in self.parts}
        weights = {f"{part.kind}_weight": part.weight for part in self.parts if part.weight != 1}
        # An image alone is a mix by its weight.
        return item | (weights or ({"image_weight": 1.0} if self.kinds == ("image",) else {}))


def find_media(item: dict) -> list[str]:
    """Return the keys of MEDIA_KEYS under which an object has media; numbers and truth values are none."""
    return [key for key in MEDIA_KEYS if _holds_media(item.get(key))]


def _holds_media(value) -> bool:
    if isinstance(value, dict):
        # Arrow may store an absent object as one of absent parts.
        return any(part is not None for part in value.values())
    return isinstance(value, (str, bytes, list)) and bool(value)


def count_images(item: dict) -> int:
    """Return how many images of an object stand in its conversation: all media of a record are one."""
    if find_media(item):
        return 1
    images = next((item[key] for key in IMAGE_KEYS if item.get(key)), ())
    return len(images) if isinstance(images, (list, tuple)) else 1


def mix_images(item: dict, images: tuple, name: str) -> tuple:
    """Return the images of a record: those that are given, or one MediaMix of them and the record's media.

    item: the record's keys that are not null. images: of `image` or `images`. A record without media and weights has
    its images as they are. Raises DataError with the name of the record for a weight that is no number of at least 0,
    or that has no medium, for weights that are all 0, and for anything but one path under a key.
    """
    paths = {key: item[key] for key in find_media(item)}
    weights = {key.removesuffix("_weight"): _read_weight(item[key], key, name) for key in WEIGHT_KEYS if key in item}
    if images:
        paths = {"image": images[0] if len(images) == 1 else list(images)} | paths
    for key in item if find_media(item) else ():
        near = difflib.get_close_matches(key, WEIGHT_KEYS, n=1, cutoff=0.85)
        if near and key not in WEIGHT_KEYS:
            raise DataError(f"{name} has the key {key!r}, which is not read; did you mean {near[0]!r}?")
    for kind in weights:
        if kind not in paths:
            raise DataError(f"{name} has '{kind}_weight' and no {kind!r}; name the file, or leave the weight out.")
    if not (weights or find_media(paths)):
        return images
    for kind, path in paths.items():
        _check_path(path, kind, name)
    parts = tuple(MediaPart(kind, path, weights.get(kind, 1.0)) for kind, path in paths.items())
    if not any(part.weight for part in parts):
        raise DataError(f"{name}: the weights of all its media are 0; give one of them a weight above 0.")
    return (MediaMix(parts),)


def _read_weight(value, key: str, name: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and 0 <= value <= sys.float_info.max):
        raise DataError(f"{name}: {key!r} is {describe(value)}, expected a number of at least 0.")
    return float(value)


def _check_path(value, kind: str, name: str) -> None:
    if isinstance(value, str) and not value.startswith("data:"):
        return
    if isinstance(value, (list, tuple)):
        raise DataError(
            f"{name}: {kind!r} is a list of {len(value)}, expected one path: all media of a record together are one "
            "image, with one file of each kind. Make a record of each."
        )
    what = "a data URL" if isinstance(value, str) else describe(value)
    raise DataError(
        f"{name}: {kind!r} holds {what}, expected the path of a file below the image folder, as for all media of a "
        f"record with several. If it is none, leave the key out: {rewriting(name, f'--drop {kind}')}"
    )


def get_paths(images: tuple) -> Iterator[str | bytes]:
    """Yield the images of a record, and of a mix the paths of its parts."""
    for image in images:
        yield from (part.path for part in image.parts) if isinstance(image, MediaMix) else (image,)


def get_mixes(images: tuple) -> Iterator[MediaMix]:
    """Yield the mixes among the images of a record."""
    return (image for image in images if isinstance(image, MediaMix))


def kind_bits(images: tuple) -> int:
    """Return the kinds of media in the mixes of a record as bits, that of KINDS[k] is 2**k; 0 without a mix."""
    kinds = {kind for mix in get_mixes(images) for kind in mix.kinds}
    return sum(1 << k for k, kind in enumerate(KINDS) if kind in kinds)


def check_no_media(item: dict, name: str, where: str) -> None:
    """Raise DataError for an object with media, where only images are read; where: that place, for the message."""
    found = [*find_media(item), *(key for key in WEIGHT_KEYS if item.get(key) is not None)]
    if found:
        raise DataError(
            f"{name} has {found[0]!r}; {where} images alone. Write such records to a JSON file with paths of their "
            "media, remove them, or extract frames as images."
        )
