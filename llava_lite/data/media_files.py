"""Find the media of a record below the image folder, check them, and load them for the tower.

As for images, paths in data are not trusted: none may leave the image folder (safe_path).
"""

import os
from typing import NamedTuple

import torch

from llava_lite.data.errors import DataError
from llava_lite.data.image_files import find_image, inspect_image, safe_path, why_no_file
from llava_lite.data.records.keys import rewriting
from llava_lite.data.records.media import MediaMix, MediaPart
from llava_lite.media.audio import FRAME_LEN, RATE_HZ, load_audio
from llava_lite.media.decoder import check_decoder
from llava_lite.media.files import MediaError, read_bytes
from llava_lite.media.image import ImageError
from llava_lite.media.layout import ImageLayout
from llava_lite.media.load import load_media
from llava_lite.media.resample import resampled_len
from llava_lite.media.wav import OtherWav, read_wav

# The header of a .wav file is read from here, and from the whole file where it is longer.
HEAD_BYTES = 1 << 16


class LoadedMix(NamedTuple):
    """The media of one image: its (width, height), those of the tower's images; {kind: (sample, weight)}."""

    size: tuple[int, int]
    media: dict[str, tuple[torch.Tensor, float]]


def check_kinds(mix: MediaMix, layout: ImageLayout, name: str) -> None:
    """Raise DataError with the name of the record if the run's tower cannot read its media."""
    unread = [kind for kind in mix.kinds if kind not in layout.media_kinds]
    if unread:
        reads = ", ".join(layout.media_kinds) or ("images alone" if layout.num_features else "text alone")
        # Of an image alone it is the weight that has no meaning.
        found = next((kind for kind in unread if kind != "image"), "image" if layout.media else "image_weight")
        raise DataError(
            f"{name} has {found!r}, which this model does not read: it reads {reads}, and other media need a tower of "
            "ImageBind that has them. Remove the record, extract its frames as images, or leave the key out: "
            f"{rewriting(name, f'--drop {found}')}"
        )
    if layout.is_anyres or (layout.aspect_ratio == "random_crop" and "image" in mix.kinds):
        raise DataError(
            f"{name} has several media or a weight, and --image_aspect_ratio {layout.aspect_ratio} is for images "
            "alone. Train with --image_aspect_ratio square, or leave the record out."
        )


def find_part(image_folder: str | None, part: MediaPart, follow_links: bool = False) -> tuple[str, bool]:
    """Return the path of a file of a record, and whether it is an image with another suffix; see find_image.

    Raises ImageError or MediaError if there is no such file, or if it is outside the image folder.
    """
    if part.kind == "image":
        return find_image(image_folder, part.path, follow_links)
    if image_folder is None:
        raise MediaError(part.kind, part.path, "no image folder is given; name it with --image_folder.")
    try:
        path = safe_path(image_folder, part.path, follow_links)
    except ImageError as error:
        raise MediaError(part.kind, error.path, error.reason) from error
    if not os.path.isfile(path):
        raise MediaError(part.kind, path, why_no_file(path))
    return path, False


def inspect_mix(
    image_folder: str | None, mix: MediaMix, layout: ImageLayout, decode: bool = False, follow_links: bool = False
) -> tuple[int, int, int]:
    """Return (width, height, 0 or 1 for another suffix) of a mix: of its image, else of the tower's images and 0.

    Raises ImageError or MediaError for a file that is missing, empty or no image where there must be one, and for
    points and motion that the tower cannot read; ImportError for a file that needs PyAV, which is not installed.
    decode: load every file, for all other errors.
    """
    size, has_other_suffix = (layout.crop_px, layout.crop_px), False
    for part in mix.parts:
        path, is_other = find_part(image_folder, part, follow_links)
        if part.kind in ("image", "thermal"):
            found = inspect_image(path, decode)
            size, has_other_suffix = (found, is_other) if part.kind == "image" else (size, has_other_suffix)
        else:
            _check_file(part.kind, path)
        # Their loaders are quick, and find what would stop the tower: too few points, another length.
        if decode or part.kind in ("point", "imu"):
            load_media(part.kind, path, **layout.media_options(part.kind))
    return (*size, int(has_other_suffix))


def _check_file(kind: str, path: str) -> None:
    """Raise MediaError for a file that is empty, too short or no sound, ImportError for one that needs PyAV."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise MediaError(kind, path, f"{error.strerror}.") from error
    if not head:
        raise MediaError(kind, path, "it is empty.")
    if kind == "video":
        check_decoder(path)
    elif kind == "audio" and not _has_a_frame(head):
        _check_sound(path)


def _has_a_frame(data: bytes) -> bool | None:
    """Return whether a .wav file holds enough sound for a spectrogram; None for another file."""
    try:
        samples, rate = read_wav(data)
    except OtherWav:
        return None
    return resampled_len(len(samples), rate, RATE_HZ) >= FRAME_LEN


def _check_sound(path: str) -> None:
    data = read_bytes("audio", path)
    has_a_frame = _has_a_frame(data)
    if has_a_frame is None and not (path.lower().endswith(".wav") and data[:4] != b"RIFF"):
        # Another format, or compressed samples, which are not decoded here.
        check_decoder(path)
    elif not has_a_frame:
        try:
            # It says what is wrong.
            load_audio(path)
        except ImportError as error:
            reason = "it does not begin with RIFF and WAVE, and without PyAV no other sound can be read."
            raise MediaError("audio", path, reason) from error


def load_mix(
    image_folder: str | None, mix: MediaMix, layout: ImageLayout, name: str, follow_links: bool = False
) -> LoadedMix:
    """Return the media of a record, loaded as the tower reads them; DataError with its name if one cannot be used."""
    check_kinds(mix, layout, name)
    try:
        paths = {part.kind: find_part(image_folder, part, follow_links)[0] for part in mix.parts}
        samples = {kind: load_media(kind, path, **layout.media_options(kind)) for kind, path in paths.items()}
    except (ImageError, MediaError) as error:
        raise DataError(f"{name}: {error}") from error
    weights = {part.kind: part.weight for part in mix.parts}
    size = (layout.crop_px, layout.crop_px)
    return LoadedMix(size, {kind: (sample, weights[kind]) for kind, sample in samples.items()})
