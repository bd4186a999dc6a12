"""Clips of a video: which frames, which crops, which numbers."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from llava_lite.media.files import MediaError
from llava_lite.media.video import choose_frames, crop_clip, load_video

MEAN, STD = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture
def make_video(tmp_path):
    """Return a function that writes a video whose frame i is of the grey level 10 * levels[i]."""
    av = pytest.importorskip("av", reason="decodes videos; the extra media brings it")

    def make(levels, fps=4, name="video.mkv", codec="ffv1", pix_fmt="bgr0", width=40, height=24):
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=fps)
            stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
            for level in levels:
                pixels = np.full((height, width, 3), 10 * level, dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
        return path

    return make


def levels_of(clips):
    """Return a tenth of the grey level of each frame of each clip, the three crops together."""
    pixels = clips * STD[:, None, None, None] + MEAN[:, None, None, None]
    levels = (25.5 * pixels).mean(dim=(1, 3, 4)).round().int()
    assert torch.equal(levels[0::3], levels[1::3])
    assert torch.equal(levels[0::3], levels[2::3])
    return levels[0::3].tolist()


# Lossless; with frames that depend on earlier ones; with frames that depend on later ones as well.
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"name": "video.mp4", "codec": "mpeg4", "pix_fmt": "yuv420p"},
        {"name": "video.mp4", "codec": "libx264", "pix_fmt": "yuv420p"},
        {"name": "video.avi", "codec": "mpeg4", "pix_fmt": "yuv420p"},
    ],
    ids=["ffv1", "mpeg4", "h264", "avi"],
)
def test_five_clips_of_two_seconds_have_their_first_and_last_frame(options, make_video):
    # 6 s at 4 frames a second: clips start at 0, 1, 2, 3 and 4 s and have 8 frames.
    clips = load_video(make_video(range(24), **options), side=16)
    assert clips.shape == (15, 3, 2, 16, 16)
    assert clips.dtype == torch.float32
    assert levels_of(clips) == [[0, 7], [4, 11], [8, 15], [12, 19], [16, 23]]


def test_path_and_bytes_give_the_same(make_video):
    path = make_video(range(8))
    assert torch.equal(load_video(path, side=16), load_video(path.read_bytes(), side=16))


def test_a_short_video_gives_equal_clips(make_video):
    assert levels_of(load_video(make_video([1, 2, 3]), side=16)) == [[1, 3]] * 5


def test_a_clip_without_a_new_frame_has_the_one_on_the_screen(make_video):
    # A frame every 4 s, 12 s in all: clips start at 0, 2.5, 5, 7.5 and 10 s.
    found = levels_of(load_video(make_video([1, 2, 3], fps=Fraction(1, 4)), side=16))
    assert found == [[1, 1], [2, 2], [2, 2], [3, 3], [3, 3]]


def test_more_frames_are_spread_over_the_clip():
    times = [Fraction(index, 4) for index in range(24)]
    assert choose_frames(times, Fraction(1), Fraction(3), 4) == [times[4], times[6], times[8], times[11]]
    assert choose_frames(times, Fraction(9, 10), Fraction(11, 10), 2) == [times[4], times[4]]


@pytest.mark.parametrize("upright", [False, True])
def test_crops_are_start_middle_and_end_of_the_long_side(upright):
    clip = torch.rand(2, 3, 8, 21, generator=torch.Generator().manual_seed(0))
    clip = clip.transpose(2, 3) if upright else clip
    # The short side is the crop's already, so nothing is resized and the crops are plain cuts: 21 - 8 = 13 pixels of
    # room, of which 7 lie before the middle.
    crops = crop_clip(clip, 8)
    cut = (lambda start: clip[:, :, start : start + 8]) if upright else (lambda start: clip[..., start : start + 8])
    assert [torch.equal(crop, cut(start)) for crop, start in zip(crops, (0, 7, 13), strict=True)] == [True] * 3


def test_the_long_side_is_rounded_down_and_not_smoothed():
    clip = torch.rand(1, 3, 12, 19, generator=torch.Generator().manual_seed(0))
    crops = crop_clip(clip, 6)
    # 19 / 12 * 6 = 9.5, so 9; bilinear between the two pixels around each centre.
    rows = [(index + 0.5) * 12 / 6 - 0.5 for index in range(6)]
    columns = [(index + 0.5) * 19 / 9 - 0.5 for index in range(9)]

    def pixel(channel, y, x):
        top, left = int(y), int(x)
        corners = clip[0, channel, top : top + 2, left : left + 2]
        weights = torch.outer(torch.tensor([1 - (y - top), y - top]), torch.tensor([1 - (x - left), x - left]))
        return float((corners * weights).sum())

    resized = torch.tensor([[[pixel(channel, y, x) for x in columns] for y in rows] for channel in range(3)])
    assert torch.allclose(crops[0][0], resized[:, :, :6], atol=1e-6)
    assert torch.allclose(crops[1][0], resized[:, :, 2:8], atol=1e-6)
    assert torch.allclose(crops[2][0], resized[:, :, 3:], atol=1e-6)


def test_a_file_that_is_no_video_is_told_with_its_path(tmp_path):
    pytest.importorskip("av", reason="decodes videos; the extra media brings it")
    path = tmp_path / "text.mp4"
    path.write_text("no video")
    with pytest.raises(MediaError, match=r"cannot use the video '.*text.mp4': it cannot be decoded"):
        load_video(path)


def test_a_sound_is_no_video():
    pytest.importorskip("av", reason="decodes videos; the extra media brings it")
    import io
    import wave

    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(8000))
    with pytest.raises(MediaError, match="it has no video stream"):
        load_video(stream.getvalue())
