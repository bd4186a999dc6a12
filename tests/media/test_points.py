"""Points are those of the file in every format, as float32."""

import io

import numpy as np
import pytest
import torch

from llava_lite.media.files import MediaError
from llava_lite.media.points import load_points

POINTS = np.array([[0.5, -1.0, 2.0], [3.0, 0.25, -0.125], [1.0, 2.0, 3.0], [-4.0, 5.0, 6.5]])


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def saved(tensor):
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


def lines(prefix="", separator=" ", extra=""):
    return "\n".join(prefix + separator.join(map(str, point)) + extra for point in POINTS) + "\n"


FORMATS = {
    "npy": npy(POINTS),
    "npy with colours": npy(np.concatenate([POINTS, np.ones((4, 3))], axis=1)),
    "pt": saved(torch.from_numpy(POINTS)),
    "pt half": saved(torch.from_numpy(POINTS).half()),
    "xyz": lines().encode(),
    "xyz with comment and commas": ("# x, y, z\n\n" + lines(separator=", ")).encode(),
    "pts": ("4\n" + lines(extra=" 7 255 0 0")).encode(),
    "obj": ("# made\no thing\nvn 0 0 1\n" + lines("v ", extra=" 0.5 0.5 0.5") + "vt 0 1\nf 1 2 3\n").encode(),
    "ply": (
        "ply\nformat ascii 1.0\nelement vertex 4\nproperty float x\nproperty float y\nproperty float z\n"
        "end_header\n" + lines()
    ).encode(),
}


@pytest.mark.parametrize("name", FORMATS)
def test_points_are_those_of_the_file(name, tmp_path):
    expected = torch.tensor(POINTS, dtype=torch.float32)
    found = load_points(FORMATS[name])
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    # The content decides: the original takes a .pts for a .pt.
    path = tmp_path / "cloud.pts"
    path.write_bytes(FORMATS[name])
    assert torch.equal(load_points(path), expected)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no points at all", "it is none of a .npy file, a tensor that torch saved, .ply"),
        (b"\x00\xff\xfe", "it is none of"),
        (b"1 2\n3 4\n", r"an array of shape \(2, 2\); points are \[N, 3\]"),
        (npy(np.zeros((0, 3))), r"shape \(0, 3\)"),
        (b"1 2 3\n1 nan 3\n", "1 of its 6 values are NaN or infinite"),
        (b"1 2 3\n4 5\n", "it is none of"),
        (b"ply\nformat ascii 1.0\n", "has no end_header"),
    ],
)
def test_what_holds_no_points_is_told_with_its_path(data, reason, tmp_path):
    path = tmp_path / "cloud.xyz"
    path.write_bytes(data)
    with pytest.raises(MediaError, match=rf"cannot use the point cloud '.*cloud.xyz': .*{reason}"):
        load_points(path)


def test_fewer_points_than_an_encoder_reads_are_refused():
    assert len(load_points(npy(POINTS), min_points=4)) == 4
    with pytest.raises(MediaError, match="it holds 4 points; the encoder reads at least 5"):
        load_points(npy(POINTS), min_points=5)
