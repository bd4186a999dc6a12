"""Spectrograms are Kaldi's formula written out; clips lie where the original puts them; bad files are told by path."""

import io
import math
import wave
from fractions import Fraction

import numpy as np
import pytest
import torch

from llava_lite.media.audio import RATE_HZ, clip_starts, load_audio, mel_frames, waveform_clips
from llava_lite.media.files import MediaError


def noise(seconds, rate=RATE_HZ, seed=0):
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(int(seconds * rate)) / rate
    chirp = torch.sin(2 * math.pi * (200 + 400 * time) * time)
    return 0.4 * chirp + 0.05 * torch.randn(len(time), generator=generator)


def wav_bytes(waveform, rate=RATE_HZ, channels=1):
    samples = (waveform.clamp(-1, 1) * 32767).round().to(torch.int16).numpy()
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return stream.getvalue()


def kaldi_by_hand(waveform, num_mel_bins):
    """Return the log mel energies [T, M]: frames, mean off, pre-emphasis, Hann window, power, filters, logarithm."""
    frames = waveform.double().unfold(0, 400, 160)
    frames = frames - frames.mean(dim=1, keepdim=True)
    before = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    frames = frames - 0.97 * before
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(400, dtype=torch.float64) / 399)
    power = torch.fft.rfft(frames * window, n=512).abs() ** 2  # [T, 257]

    def mel(hz):
        return 1127 * math.log(1 + hz / 700)

    edges = [mel(20) + (mel(8000) - mel(20)) * index / (num_mel_bins + 1) for index in range(num_mel_bins + 2)]
    bins = [mel(index * 16000 / 512) for index in range(257)]
    filters = torch.zeros(257, num_mel_bins, dtype=torch.float64)
    for m, (left, centre, right) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        for k, place in enumerate(bins):
            filters[k, m] = max(0, min((place - left) / (centre - left), (right - place) / (right - centre)))
    return (power @ filters).clamp(min=torch.finfo(torch.float32).eps).log().float()


@pytest.mark.parametrize("num_mel_bins", [23, 128])
def test_mel_frames_are_kaldis_formula(num_mel_bins):
    waveform = noise(0.3)
    expected = kaldi_by_hand(waveform, num_mel_bins)
    found = mel_frames(waveform, num_mel_bins)
    assert found.shape == expected.shape == (28, num_mel_bins)
    # transformers keeps the transform in complex64.
    assert torch.allclose(found, expected, atol=1e-3)


def test_a_sound_becomes_three_clips_of_two_seconds():
    waveform = noise(5.0)
    clips = waveform_clips(waveform, RATE_HZ)
    assert clips.shape == (3, 1, 128, 204)
    assert clips.dtype == torch.float32
    for clip, start in zip(clips, (0, 24000, 48000), strict=True):
        frames = kaldi_by_hand(waveform[start : start + 32000], 128)
        assert frames.shape == (198, 128)
        assert torch.allclose(clip[0, :, :198], (frames.T + 4.268) / 9.138, atol=1e-3)
    # Two seconds have 198 frames of 25 ms; the last six are zeros before the normalisation.
    assert torch.allclose(clips[:, :, :, 198:], torch.tensor(4.268 / 9.138))


def test_a_short_sound_gives_equal_clips_padded_behind():
    clips = waveform_clips(noise(0.5), RATE_HZ)
    assert torch.equal(clips[0], clips[1])
    assert torch.equal(clips[0], clips[2])
    assert torch.allclose(clips[:, :, :, 48:], torch.tensor(4.268 / 9.138))


def test_clips_start_at_equal_steps_until_the_last_that_fits():
    assert clip_starts(12.0, 3, 2) == [0, 5, 10]
    assert clip_starts(12.0, 5, 2) == [0, Fraction(5, 2), 5, Fraction(15, 2), 10]
    assert clip_starts(1.5, 3, 2) == [0, 0, 0]
    assert clip_starts(4.0, 1, 2) == [0]


def test_sizes_of_a_smaller_encoder():
    clips = waveform_clips(noise(1.0), RATE_HZ, num_mel_bins=16, num_frames=28, num_clips=2, clip_s=0.3)
    assert clips.shape == (2, 1, 16, 28)
    # 0.3 s have exactly 28 frames; a clip of 1 s is cut off.
    assert waveform_clips(noise(1.0), RATE_HZ, num_frames=28, clip_s=1).shape == (3, 1, 128, 28)


def test_overlapping_clips_do_not_change_each_other():
    waveform = noise(3.0) + 0.2
    kept = waveform.clone()
    clips = waveform_clips(waveform, RATE_HZ)
    assert torch.equal(waveform, kept)
    assert torch.equal(clips[1], waveform_clips(waveform[8000:40000], RATE_HZ)[0])


def test_a_file_of_another_rate_is_resampled(tmp_path):
    path = tmp_path / "tone.wav"
    time = torch.arange(44100) / 44100
    path.write_bytes(wav_bytes(0.5 * torch.sin(2 * math.pi * 440 * time), rate=44100))
    expected = waveform_clips(0.5 * torch.sin(2 * math.pi * 440 * torch.arange(16000) / 16000), RATE_HZ)
    found = load_audio(path)
    # The loudest bin and its neighbours; quiet ones hold the rounding to 16 bits and the end of the filter.
    loud = expected > expected.amax() - 0.5
    assert torch.allclose(found[loud], expected[loud], atol=2e-3)
    assert torch.equal(load_audio(str(path)), found)
    assert torch.equal(load_audio(path.read_bytes()), found)


def test_of_two_channels_the_first_is_read():
    left, right = noise(1.0), noise(1.0, seed=1)
    stereo = wav_bytes(torch.stack([left, right], dim=1), channels=2)
    assert torch.equal(load_audio(stereo), load_audio(wav_bytes(left)))


@pytest.mark.parametrize(
    ("seconds", "reason"),
    [(0.0, r"there is no sound in it \(0 samples\)"), (0.01, r"it lasts 10.0 ms; .* at least 25 ms")],
)
def test_a_sound_that_is_empty_or_too_short_is_told_with_its_path(seconds, reason, tmp_path):
    path = tmp_path / "short.wav"
    path.write_bytes(wav_bytes(noise(seconds)))
    with pytest.raises(MediaError, match=rf"cannot use the audio '.*short.wav': {reason}"):
        load_audio(path)


def test_silence_is_no_error():
    assert torch.isfinite(load_audio(wav_bytes(torch.zeros(16000)))).all()


def test_missing_and_empty_files_are_told_with_their_path(tmp_path):
    with pytest.raises(MediaError, match=r"nowhere.wav': there is no such file"):
        load_audio(tmp_path / "nowhere.wav")
    (tmp_path / "empty.wav").touch()
    with pytest.raises(MediaError, match=r"empty.wav': it is empty"):
        load_audio(tmp_path / "empty.wav")
    with pytest.raises(TypeError, match="audio is a path or the bytes of a file; got list"):
        load_audio([1, 2])


def test_samples_that_are_not_finite_are_told_with_their_path():
    content = np.array([0.0, np.nan] * 300, dtype="<f4").tobytes()
    chunk = (3).to_bytes(2, "little") + (1).to_bytes(2, "little") + (16000).to_bytes(4, "little")
    chunk += (64000).to_bytes(4, "little") + (4).to_bytes(2, "little") + (32).to_bytes(2, "little")
    data = b"RIFF\0\0\0\0WAVEfmt " + (16).to_bytes(4, "little") + chunk
    with pytest.raises(MediaError, match=r"some of its samples are NaN or infinite"):
        load_audio(data + b"data" + len(content).to_bytes(4, "little") + content)


def test_another_format_gives_the_samples_of_the_wav_file(tmp_path):
    av = pytest.importorskip("av", reason="decodes what is not .wav; the extra media brings it")
    waveform = noise(1.0)
    samples = (waveform.clamp(-1, 1) * 32767).round().to(torch.int16).numpy()
    with av.open(str(tmp_path / "sound.flac"), "w") as container:
        stream = container.add_stream("flac", rate=16000)
        stream.layout, stream.format = "mono", "s16"
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    assert torch.equal(load_audio(tmp_path / "sound.flac"), load_audio(wav_bytes(waveform)))
    with pytest.raises(MediaError, match=r"cannot use the audio '16 bytes': it cannot be decoded"):
        load_audio(b"no sound at all.")
