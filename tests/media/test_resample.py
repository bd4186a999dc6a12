"""The resampled waveform is the sum of its formula, and a tone stays a tone."""

import math

import pytest
import torch

from llava_lite.media import resample as module
from llava_lite.media.resample import resample, resampled_len


def by_hand(waveform, rate, new_rate):
    """Return the sum over all samples for each output, in double precision (torchaudio's formula)."""
    cutoff = 0.99 * min(rate, new_rate)
    outputs = []
    for n in range(math.ceil(len(waveform) * new_rate / rate)):
        total = 0.0
        for j, x in enumerate(waveform.tolist()):
            t = cutoff * (j / rate - n / new_rate)
            if abs(t) < 6:
                sinc = 1.0 if t == 0 else math.sin(math.pi * t) / (math.pi * t)
                total += x * sinc * math.cos(math.pi * t / 12) ** 2 * cutoff / rate
        outputs.append(total)
    return torch.tensor(outputs)


@pytest.mark.parametrize(("rate", "new_rate"), [(44100, 16000), (8000, 16000), (22050, 16000), (48000, 16000), (7, 5)])
def test_outputs_are_the_sum_of_the_formula(rate, new_rate):
    waveform = torch.randn(120, generator=torch.Generator().manual_seed(0))
    found = resample(waveform, rate, new_rate)
    assert len(found) == resampled_len(120, rate, new_rate)
    # Some 40 products of float32 in another order.
    assert torch.allclose(found, by_hand(waveform, rate, new_rate), atol=2e-6)


def test_a_part_is_the_part_of_the_full_waveform(monkeypatch):
    waveform = torch.randn(500, generator=torch.Generator().manual_seed(0))
    full = resample(waveform, 44100, 16000)
    assert torch.equal(resample(waveform, 44100, 16000, 30, 90), full[30:90])
    assert torch.equal(resample(waveform, 44100, 16000, 100, 9999), full[100:])
    assert resample(waveform, 44100, 16000, 9999).shape == (0,)
    monkeypatch.setattr(module, "BLOCK_LEN", 7)
    assert torch.equal(resample(waveform, 44100, 16000), full)


def test_a_tone_stays_the_same_tone():
    tone = lambda rate: torch.sin(2 * math.pi * 440 * torch.arange(rate // 4) / rate)  # noqa: E731
    found = resample(tone(44100), 44100, 16000)
    # Away from the ends; the filter passes 440 Hz to a thousandth.
    assert torch.allclose(found[100:-100], tone(16000)[100:-100], atol=2e-3)


def test_the_same_rate_changes_nothing():
    waveform = torch.randn(9)
    assert torch.equal(resample(waveform, 16000, 16000, 2, 5), waveform[2:5])


def test_a_rate_without_common_divisor_needs_no_large_filter():
    found = resample(torch.ones(2000), 44101, 16000)
    assert len(found) == math.ceil(2000 * 16000 / 44101)
    assert found[50:-50].tolist() == pytest.approx([1.0] * len(found[50:-50]), abs=5e-3)
