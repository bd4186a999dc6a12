"""Samples of a .wav file are those that were written, in every width."""

import io
import struct
import wave

import numpy as np
import pytest

from llava_lite.media.wav import OtherWav, read_wav

VALUES = np.array([[-1.0, 0.5], [0.0, -0.25], [0.75, 0.125]])


def pcm(bits, channels=2, rate=8000):
    """Return a file that the standard library writes."""
    whole = (VALUES[:, :channels] * 2 ** (bits - 1)).astype(np.int64).clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(bits // 8)
        file.setframerate(rate)
        for value in whole.ravel().tolist():
            file.writeframes((value + 128).to_bytes(1, "little") if bits == 8 else _signed(value, bits))
    return stream.getvalue()


def _signed(value, bits):
    return int(value).to_bytes(bits // 8, "little", signed=True)


def riff(format_chunk, content, extra=b""):
    chunks = b"fmt " + struct.pack("<I", len(format_chunk)) + format_chunk + extra
    chunks += b"data" + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def header(code, channels, rate, bits):
    size = channels * bits // 8
    return struct.pack("<HHIIHH", code, channels, rate, rate * size, size, bits)


@pytest.mark.parametrize("bits", [8, 16, 24, 32])
def test_whole_numbers_are_fractions_of_their_range(bits):
    samples, rate = read_wav(pcm(bits))
    assert rate == 8000
    assert samples.dtype == np.float32
    assert np.array_equal(samples, VALUES.astype(np.float32))


@pytest.mark.parametrize("bits", [32, 64])
def test_floats_are_taken_as_they_are(bits):
    content = VALUES.astype(f"<f{bits // 8}").tobytes()
    samples, rate = read_wav(riff(header(3, 2, 44100, bits), content, extra=b"LIST\x03\0\0\0abc\0"))
    assert rate == 44100
    assert np.array_equal(samples, VALUES.astype(np.float32))


def test_extensible_header_and_a_file_that_ends_early():
    guid = struct.pack("<HHIH", 22, 16, 3, 1) + bytes(14)
    content = (VALUES * 2**15).clip(-(2**15), 2**15 - 1).astype("<i2").tobytes()
    data = riff(header(0xFFFE, 2, 8000, 16) + guid, content)
    assert np.array_equal(read_wav(data)[0], VALUES.astype(np.float32))
    # One byte of the last sample is missing, and with it the frame.
    assert np.array_equal(read_wav(data[:-1])[0], VALUES[:2].astype(np.float32))
    # Programs that stream do not know the length and write the largest.
    streamed = data.replace(struct.pack("<I", len(content)) + content, b"\xff\xff\xff\xff" + content)
    assert np.array_equal(read_wav(streamed)[0], VALUES.astype(np.float32))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"ID3\x04mp3", "does not begin with RIFF"),
        (riff(header(7, 1, 8000, 8), b"abc"), "encoding 7 with 8 bits"),
        (riff(header(1, 0, 8000, 16), b""), "0 channels at 8000 Hz"),
        (b"RIFF\0\0\0\0WAVE", "no format or no data"),
    ],
)
def test_other_files_are_told_apart(data, reason):
    with pytest.raises(OtherWav, match=reason):
        read_wav(data)
