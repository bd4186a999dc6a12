"""Turn a video into the clips that ImageBind reads: five of two seconds, two frames each, cropped at three places.

S clips times crops, F frames of a clip, H and W the side of a crop. Times, sizes and crops are those of ImageBind,
whose clips come from pytorchvideo.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from llava_lite.media.audio import clip_starts
from llava_lite.media.decoder import open_container
from llava_lite.media.files import MediaError, name_source, read_bytes
from llava_lite.media.pixels import normalise

NUM_CROPS = 3


def load_video(source, side=224, num_frames=2, num_clips=5, clip_s=2) -> torch.Tensor:
    """Return the clips of a video, normalised, float32 [S, 3, F, H, W]; S counts clips first, then their crops.

    source: path or bytes. Raises MediaError with the path if there is no frame to decode, ImportError with the extra
    if PyAV is missing. A clip during which no new frame is shown has the frame that is on the screen.
    """
    data = read_bytes("video", source)
    with open_container("video", source, data) as (stream, container):
        times = frame_times(container, stream)
        if not times:
            raise MediaError("video", name_source(source), "it has no frames.")
        starts = clip_starts(float(duration(stream, times)), num_clips, clip_s)
        chosen = [choose_frames(times, start, start + clip_s, num_frames) for start in starts]
        frames = decode_frames(container, stream, sorted({time for clip in chosen for time in clip}))
    if not frames:
        raise MediaError("video", name_source(source), "none of its frames can be decoded.")
    nearest = {time: frames[min(frames, key=lambda found: abs(found - time))] for clip in chosen for time in clip}
    crops = [crop for clip in chosen for crop in crop_clip(torch.stack([nearest[time] for time in clip]), side)]
    return normalise(torch.stack(crops).transpose(1, 2))


def frame_times(container, stream) -> list[Fraction]:
    """Return when frames are shown, in seconds from the first, in order; nothing is decoded."""
    stamps = [packet.dts if packet.pts is None else packet.pts for packet in container.demux(stream)]
    stamps = sorted(stamp for stamp in stamps if stamp is not None)
    return [(stamp - stamps[0]) * stream.time_base for stamp in stamps]


def duration(stream, times: list[Fraction]) -> Fraction:
    """Return the length of a video in seconds, by its header, else by its frames."""
    if stream.duration:
        return stream.duration * stream.time_base
    return times[-1] + (1 / Fraction(stream.average_rate) if stream.average_rate else 0)


def choose_frames(times: list[Fraction], start: Fraction, end: Fraction, num_frames: int) -> list[Fraction]:
    """Return the times of frames, equally spaced in those with start <= time < end, its first and last among them."""
    within = [time for time in times if start <= time < end] or [max(t for t in times if t <= start)]
    indices = torch.linspace(0, len(within) - 1, num_frames).long()
    return [within[index] for index in indices.tolist()]


def decode_frames(container, stream, times: list[Fraction]) -> dict[Fraction, torch.Tensor]:
    """Return {time: frame [3, H, W] from 0 to 1} of the frames that are shown at `times`, in rising order."""
    first = stream.start_time or 0
    frames = {}
    for time in times:
        stamp = first + round(time / stream.time_base)
        container.seek(stamp, stream=stream)
        for frame in container.decode(stream):
            shown = frame.dts if frame.pts is None else frame.pts
            if shown is None or shown >= stamp:
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                frames[time] = pixels.permute(2, 0, 1).float() / 255
                break
    return frames


def crop_clip(clip: torch.Tensor, side: int) -> list[torch.Tensor]:
    """Return the crops [F, 3, side, side] of a clip [F, 3, H, W]: start, middle and end of the long side."""
    height, width = clip.shape[-2:]
    short = min(height, width)
    # The long side in proportion, rounded down. Without antialiasing, as in the original.
    height, width = (math.floor(length / short * side) if length != short else side for length in (height, width))
    resized = torch.nn.functional.interpolate(clip, size=(height, width), mode="bilinear", align_corners=False)
    room = max(height, width) - side
    offsets = [0, math.ceil(room / 2), room]
    if height > width:
        return [resized[:, :, offset : offset + side] for offset in offsets]
    return [resized[:, :, :, offset : offset + side] for offset in offsets]
