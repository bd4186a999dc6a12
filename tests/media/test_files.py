"""Bytes and arrays of files, and one sentence with the path for what is wrong with them."""

import io
import pickle

import numpy as np
import pytest
import torch

from llava_lite.media.files import MediaError, check_finite, is_array_file, read_array, read_bytes


def saved(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int16])
def test_tensors_and_arrays_are_read(dtype):
    tensor = torch.tensor([[1, 2], [3, 4]], dtype=dtype)
    assert np.array_equal(read_array("imu", "x.pt", saved(tensor)), [[1, 2], [3, 4]])
    if dtype != torch.bfloat16:
        assert np.array_equal(read_array("imu", "x.npy", npy(tensor.numpy())), [[1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (saved({"points": torch.zeros(2)}), "it holds a dict, not one tensor"),
        (pickle.dumps(print), "cannot be read as an array"),
        (npy(np.array([print]), allow_pickle=True), "cannot be read as an array"),
        (npy(np.array(["a"])), "its values are <U1, not numbers"),
        (saved(torch.zeros(9))[:100], "cannot be read as an array"),
    ],
    ids=["dict", "code", "objects", "text", "cut"],
)
def test_other_contents_are_told_with_their_path(data, reason):
    assert is_array_file(data)
    with pytest.raises(MediaError, match=rf"cannot use the imu 'x.pt': .*{reason}"):
        read_array("imu", "x.pt", data)


def test_missing_empty_and_strange_sources(tmp_path):
    with pytest.raises(MediaError, match="cannot use the depth 'nowhere': there is no such file"):
        read_bytes("depth", "nowhere")
    with pytest.raises(MediaError, match="cannot use the depth '0 bytes': it is empty"):
        read_bytes("depth", b"")
    with pytest.raises(MediaError, match="IsADirectoryError"):
        read_bytes("depth", tmp_path)
    with pytest.raises(TypeError, match="depth is a path or the bytes of a file; got int"):
        read_bytes("depth", 3)
    assert read_bytes("depth", bytearray(b"ab")) == b"ab"


def test_values_that_are_not_finite_are_counted():
    check_finite("imu", "x", np.array([1, 2]))
    with pytest.raises(MediaError, match="2 of its 3 values are NaN or infinite"):
        check_finite("imu", "x", np.array([1.0, np.nan, np.inf]))


def test_error_reaches_another_process_with_its_parts():
    error = pickle.loads(pickle.dumps(MediaError("audio", "x.wav", "it is empty.")))
    assert (error.kind, error.path, error.reason) == ("audio", "x.wav", "it is empty.")
    assert str(error) == "cannot use the audio 'x.wav': it is empty."
