"""Resample a waveform to another rate with a windowed sinc, as torchaudio does by default.

y[n] = sum over j of x[j] h(j / rate - n / new_rate), h(t) = f sinc(f t) cos^2(pi f t / (2 WIDTH)) / rate for
|f t| < WIDTH and 0 outside, with f = ROLLOFF min(rate, new_rate).
"""

from __future__ import annotations

import math

import torch

# Zero crossings of the sinc on either side, and the cutoff as a fraction of the lower of both rates' half.
WIDTH, ROLLOFF = 6, 0.99
# Outputs computed at once; bounds the memory of long waveforms.
BLOCK_LEN = 2**18


def resampled_len(length: int, rate: int, new_rate: int) -> int:
    """Return the samples of a resampled waveform."""
    return -(-length * new_rate // rate)


def resample(waveform: torch.Tensor, rate: int, new_rate: int, start: int = 0, stop: int | None = None):
    """Return samples [start, stop) of a waveform [T] after resampling; rates in Hz. Around it lies silence."""
    length = resampled_len(len(waveform), rate, new_rate)
    stop = length if stop is None else min(stop, length)
    if rate == new_rate:
        return waveform[start:stop]
    divisor = math.gcd(rate, new_rate)
    rate, new_rate = rate // divisor, new_rate // divisor
    reach = math.ceil(WIDTH * rate / (ROLLOFF * min(rate, new_rate)))
    padded = torch.nn.functional.pad(waveform, (reach, reach + 1))
    windows = padded.unfold(0, 2 * reach + 2, 1)  # [T, taps]; row i starts at sample i - reach
    filters = sinc_filters(rate, new_rate, reach).to(waveform.dtype)
    blocks = []
    for first in range(start, stop, BLOCK_LEN):
        places = torch.arange(first, min(first + BLOCK_LEN, stop)) * rate
        blocks.append((windows[places // new_rate] * filters[places % new_rate]).sum(dim=1))
    return torch.cat(blocks) if blocks else waveform[:0]


def sinc_filters(rate: int, new_rate: int, reach: int) -> torch.Tensor:
    """Return weights [new_rate, 2 reach + 2] of the samples -reach ... reach + 1 around an output.

    Row p is for outputs p / new_rate of a sample after the sample that they are counted from.
    """
    cutoff = ROLLOFF * min(rate, new_rate)
    taps = torch.arange(-reach, reach + 2, dtype=torch.float64)
    phases = torch.arange(new_rate, dtype=torch.float64)[:, None] / new_rate
    time = ((taps - phases) * cutoff / rate).clamp(-WIDTH, WIDTH)
    return torch.sinc(time) * torch.cos(time * math.pi / (2 * WIDTH)).square() * cutoff / rate
