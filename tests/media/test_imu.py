"""Records of the sensors in every layout."""

import io

import numpy as np
import pytest
import torch

from llava_lite.media.files import MediaError
from llava_lite.media.imu import load_imu

RECORD = np.random.default_rng(0).normal(size=(6, 2000)).round(3)


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_channels_come_first_or_last_and_tables_may_have_a_header(tmp_path):
    expected = torch.tensor(RECORD, dtype=torch.float32)
    path = tmp_path / "imu.csv"
    path.write_text("ax,ay,az,gx,gy,gz\n" + "\n".join(",".join(map(str, row)) for row in RECORD.T))
    stream = io.BytesIO()
    torch.save(torch.from_numpy(RECORD), stream)
    for source in (npy(RECORD), npy(RECORD.T), stream.getvalue(), path, path.read_bytes().split(b"\n", 1)[1]):
        found = load_imu(source)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


def test_sizes_of_a_smaller_encoder():
    assert load_imu(npy(RECORD[:, :40]), num_samples=40).shape == (6, 40)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(RECORD[:, :1999]), r"its shape is \(6, 1999\); the encoder reads \[6, 2000\], 10 s of both sensors"),
        (npy(np.full((6, 2000), np.inf)), "12000 of its 12000 values are NaN or infinite"),
        (b"a b\nc d", "it is neither .npy"),
        (b"\n", r"its shape is \(0,\)"),
    ],
)
def test_what_is_no_record_is_told(data, reason):
    with pytest.raises(MediaError, match=rf"cannot use the imu '\d+ bytes': {reason}"):
        load_imu(data)
