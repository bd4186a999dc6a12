"""Turn a sound into the spectrograms that ImageBind reads: three clips of two seconds.

S clips, M mel bins, T frames of 10 ms. The settings are those of ImageBind (Girdhar et al. 2023, arXiv 2305.05665),
which took them from AST (Gong et al. 2021, arXiv 2104.01778); the frames are Kaldi's. Of several channels the first is
read, as in the original, and not their mean.
"""

from __future__ import annotations

import warnings
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch

from llava_lite.media.decoder import open_container
from llava_lite.media.files import MediaError, name_source, read_bytes
from llava_lite.media.resample import resample, resampled_len
from llava_lite.media.wav import OtherWav, read_wav

RATE_HZ = 16000
# Of a frame: 25 ms, every 10 ms, transformed at the next power of two.
FRAME_LEN, HOP_LEN, FFT_LEN = 400, 160, 512
PREEMPHASIS, MIN_HZ, MEL_FLOOR = 0.97, 20, 1.192092955078125e-07
# Of AudioSet's spectrograms; the standard deviation is twice AST's, for a result of 0.5.
MEAN, STD = -4.268, 9.138


def load_audio(source, num_mel_bins=128, num_frames=204, num_clips=3, clip_s=2) -> torch.Tensor:
    """Return the spectrograms of a sound's clips, float32 [S, 1, M, T].

    source: path or bytes of a .wav file, or of another format if PyAV is installed. Raises MediaError with the path
    for a file without sound or shorter than a frame of 25 ms, ImportError with the extra if PyAV is missing.
    """
    data = read_bytes("audio", source)
    try:
        samples, rate = read_wav(data)
    except OtherWav:
        samples, rate = decode_audio(source, data)
    if not len(samples):
        raise MediaError("audio", name_source(source), "there is no sound in it (0 samples).")
    waveform = torch.from_numpy(np.ascontiguousarray(samples[:, 0]))
    if not torch.isfinite(waveform).all():
        raise MediaError("audio", name_source(source), "some of its samples are NaN or infinite.")
    try:
        return waveform_clips(waveform, rate, num_mel_bins, num_frames, num_clips, clip_s)
    except ValueError as error:
        raise MediaError("audio", name_source(source), str(error)) from error


def waveform_clips(waveform, rate, num_mel_bins=128, num_frames=204, num_clips=3, clip_s=2) -> torch.Tensor:
    """Return the spectrograms [S, 1, M, T] of clips of a waveform [samples], from -1 to 1, at `rate` Hz.

    Clips begin at equal steps from the start until the last ends with the sound; a sound that is shorter than a clip
    gives equal clips. Missing frames are zeros before the normalisation, as in the original. ValueError if the sound
    is shorter than a frame.
    """
    length = resampled_len(len(waveform), rate, RATE_HZ)
    if length < FRAME_LEN:
        raise ValueError(f"it lasts {1000 * len(waveform) / rate:.1f} ms; a spectrogram needs at least 25 ms.")
    clips = []
    for start_s in clip_starts(length / RATE_HZ, num_clips, clip_s):
        # Both are cut off as the original does, so that clips are the same to the sample.
        start, stop = int(start_s * RATE_HZ), int((start_s + clip_s) * RATE_HZ)
        frames = mel_frames(resample(waveform, rate, RATE_HZ, start, stop), num_mel_bins)[:num_frames]
        clips.append(torch.nn.functional.pad(frames, (0, 0, 0, num_frames - len(frames))).T)
    return (torch.stack(clips)[:, None] - MEAN) / STD


def clip_starts(duration_s: float, num_clips: int, clip_s: float) -> list[Fraction]:
    """Return where clips begin, in seconds: at equal steps from 0 to the last that still fits."""
    latest = Fraction(max(duration_s - clip_s, 0))
    return [latest * index / max(num_clips - 1, 1) for index in range(num_clips)]


def mel_frames(waveform: torch.Tensor, num_mel_bins: int) -> torch.Tensor:
    """Return the logarithms of mel energies [T, M], float32, of a waveform [samples] at RATE_HZ (Kaldi's fbank)."""
    from transformers.audio_utils import spectrogram, window_function

    frames = spectrogram(
        (waveform - waveform.mean()).numpy(),
        window_function(FRAME_LEN, "hann", periodic=False),
        frame_length=FRAME_LEN,
        hop_length=HOP_LEN,
        fft_length=FFT_LEN,
        power=2.0,
        center=False,
        preemphasis=PREEMPHASIS,
        mel_filters=mel_filters(num_mel_bins),
        log_mel="log",
        mel_floor=MEL_FLOOR,
        remove_dc_offset=True,
    )
    return torch.from_numpy(frames.T.copy())


@lru_cache(maxsize=4)
def mel_filters(num_mel_bins: int) -> np.ndarray:
    """Return the weights [FFT_LEN / 2 + 1, M] of Kaldi's mel filters."""
    from transformers.audio_utils import mel_filter_bank

    with warnings.catch_warnings():
        # 128 bins are more than the lowest frequencies have; Kaldi's are empty too.
        warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
        return mel_filter_bank(
            num_frequency_bins=FFT_LEN // 2 + 1,
            num_mel_filters=num_mel_bins,
            min_frequency=MIN_HZ,
            max_frequency=RATE_HZ // 2,
            sampling_rate=RATE_HZ,
            norm=None,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )


def decode_audio(source, data: bytes) -> tuple[np.ndarray, int]:
    """Return samples [T, channels], float32, and the rate in Hz of a file that PyAV decodes."""
    with open_container("audio", source, data) as (stream, container):
        import av

        converter = av.AudioResampler(format="fltp")
        frames = [out.to_ndarray() for frame in container.decode(stream) for out in converter.resample(frame)]
        frames += [out.to_ndarray() for out in converter.resample(None)]
        rate = stream.rate
    samples = np.concatenate(frames, axis=1) if frames else np.zeros((1, 0), np.float32)
    return samples.T, rate
