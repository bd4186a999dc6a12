"""The sound of a digit: the tones of a telephone's key."""

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the tiny world is drawn from scikit-learn's digits: pip install scikit-learn")

from llava_lite.media.audio import load_audio
from llava_lite.media.wav import read_wav
from playground.tiny import sound

# ITU-T Q.23, written out.
KEYS_HZ = {
    1: (697, 1209), 2: (697, 1336), 3: (697, 1477),
    4: (770, 1209), 5: (770, 1336), 6: (770, 1477),
    7: (852, 1209), 8: (852, 1336), 9: (852, 1477),
    0: (941, 1336),
}  # fmt: skip


@pytest.mark.parametrize("digit", range(10))
def test_the_two_loudest_frequencies_are_those_of_the_key(digit):
    samples = sound.draw_sound(digit, np.random.default_rng(digit))
    power = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    hz = np.fft.rfftfreq(len(samples), 1 / sound.RATE_HZ)
    loudest = [hz[part][power[part].argmax()] for part in (hz < 1050, hz >= 1050)]
    # Tones are detuned by 1% at most; a bin is 2.5 Hz wide at most.
    assert loudest == pytest.approx(KEYS_HZ[digit], rel=0.015)


def test_two_sounds_of_a_digit_differ_in_length_and_loudness():
    rng = np.random.default_rng(0)
    first, second = (sound.draw_sound(5, rng) for _ in range(2))
    assert len(first) != len(second)
    assert first.std() != pytest.approx(second.std(), rel=0.01)


def test_a_file_holds_the_samples_and_opens_as_a_sound():
    samples = sound.draw_sound(7, np.random.default_rng(1))
    data = sound.wav_bytes(samples)
    read, rate = read_wav(data)
    assert rate == sound.RATE_HZ
    # 16 bits: cut off at 1 / 32767, and read as 1 / 32768.
    assert np.abs(read[:, 0] - samples).max() < 1e-4
    assert load_audio(data, num_mel_bins=64, num_frames=96).shape == (3, 1, 64, 96)
