"""Turn digits into sound: the two tones of a telephone's key (ITU-T Q.23), with noise, at any loudness."""

import io
import wave

import numpy as np

RATE_HZ = 16000
ROWS_HZ = (697, 770, 852, 941)
COLUMNS_HZ = (1209, 1336, 1477)
# Where each digit stands on the keys: row and column.
KEYS = {0: (3, 1)} | {digit: divmod(digit - 1, 3) for digit in range(1, 10)}
MIN_S, MAX_S = 0.4, 0.9


def tones(digit):
    """Return the two frequencies of a digit in Hz."""
    row, column = KEYS[int(digit)]
    return ROWS_HZ[row], COLUMNS_HZ[column]


def draw_sound(digit, rng):
    """Return samples [n] from -1 to 1 at RATE_HZ: a digit of random length, loudness, detuning and noise."""
    seconds = np.arange(int(rng.uniform(MIN_S, MAX_S) * RATE_HZ)) / RATE_HZ
    waves = [np.sin(2 * np.pi * hz * rng.uniform(0.99, 1.01) * seconds + rng.uniform(0, 6)) for hz in tones(digit)]
    level, noise = rng.uniform(0.05, 0.4), rng.normal(0, rng.uniform(0.001, 0.02), len(seconds))
    return np.clip(level * sum(waves) + noise, -1, 1).astype(np.float32)


def wav_bytes(samples):
    """Return samples as the bytes of a .wav file of 16 bits."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE_HZ)
        out.writeframes((samples * 32767).astype("<i2").tobytes())
    return file.getvalue()
