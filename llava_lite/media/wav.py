"""Read a .wav file of PCM or float samples, by the standard library alone."""

from __future__ import annotations

import struct

import numpy as np

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE


class OtherWav(ValueError):
    """A file that is no .wav, or whose samples are compressed: the reason."""


def read_wav(data: bytes) -> tuple[np.ndarray, int]:
    """Return samples [T, channels], float32 from -1 to 1, and the rate in Hz.

    Whole numbers are divided by the largest of their width (32768 for 16 bits), as torchaudio does. A file that ends
    early gives the samples that are there. Raises OtherWav for another format, or samples other than 8 to 32 bits of
    PCM or 32 and 64 bits of float.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise OtherWav("it does not begin with RIFF and WAVE")
    chunks = read_chunks(data)
    if b"fmt " not in chunks or b"data" not in chunks or len(chunks[b"fmt "]) < 16:
        raise OtherWav("it has no format or no data")
    code, channels, rate, _, _, bits = struct.unpack("<HHIIHH", chunks[b"fmt "][:16])
    if code == EXTENSIBLE and len(chunks[b"fmt "]) >= 26:
        code = struct.unpack("<H", chunks[b"fmt "][24:26])[0]
    if not channels or not rate:
        raise OtherWav(f"{channels} channels at {rate} Hz")
    samples = decode(chunks[b"data"], code, bits)
    return samples[: len(samples) // channels * channels].reshape(-1, channels), rate


def read_chunks(data: bytes) -> dict[bytes, bytes]:
    """Return {name: content} of the chunks; the last may be shorter than it says, as in a file that was streamed."""
    chunks, position = {}, 12
    while position + 8 <= len(data):
        name, size = struct.unpack("<4sI", data[position : position + 8])
        chunks.setdefault(name, data[position + 8 : position + 8 + size])
        position += 8 + size + size % 2
    return chunks


def decode(content: bytes, code: int, bits: int) -> np.ndarray:
    """Return samples [n] as float32; OtherWav for an encoding that is not plain numbers."""
    num_bytes = bits // 8
    content = content[: len(content) // max(num_bytes, 1) * max(num_bytes, 1)]
    if code == FLOAT and bits in (32, 64):
        return np.frombuffer(content, f"<f{num_bytes}").astype(np.float32)
    if code == PCM and bits == 8:
        return (np.frombuffer(content, np.uint8).astype(np.float32) - 128) / 128
    if code == PCM and bits in (16, 32):
        return np.frombuffer(content, f"<i{num_bytes}").astype(np.float32) / 2 ** (bits - 1)
    if code == PCM and bits == 24:
        triples = np.frombuffer(content, np.uint8).reshape(-1, 3)
        # As the upper three bytes of 32 bits, whose sign is then right.
        wide = np.concatenate([np.zeros((len(triples), 1), np.uint8), triples], axis=1)
        return wide.view("<i4")[:, 0].astype(np.float32) / 2**31
    raise OtherWav(f"its samples have encoding {code} with {bits} bits")
