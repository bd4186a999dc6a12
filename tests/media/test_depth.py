"""Depths become standardised disparities, computed here by hand."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from llava_lite.media.depth import load_depth
from llava_lite.media.files import MediaError


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def disparity(metres, baseline_m=0.075, focal_px=518.857901):
    return (baseline_m * focal_px / metres / 75 - 0.0418) / 0.0295


def test_disparity_is_baseline_by_focal_length_by_depth():
    metres = np.array([[1.0, 2.0], [4.0, 8.0]])
    found = load_depth(npy(metres), side=2)
    assert found.shape == (1, 2, 2)
    assert torch.allclose(found[0], torch.tensor(disparity(metres), dtype=torch.float32), rtol=1e-5)
    other = load_depth(npy(metres), side=2, baseline_m=0.095, focal_px=600.0)
    assert torch.allclose(other[0], torch.tensor(disparity(metres, 0.095, 600.0), dtype=torch.float32), rtol=1e-5)


def test_whole_numbers_are_millimetres_unless_told_otherwise(tmp_path):
    millimetres = np.array([[1000, 2000], [4000, 8000]], dtype=np.uint16)
    path = tmp_path / "depth.png"
    Image.fromarray(millimetres).save(path)
    expected = load_depth(npy(millimetres / 1000), side=2)
    assert torch.allclose(load_depth(path, side=2), expected, rtol=1e-5)
    assert torch.allclose(load_depth(npy(millimetres * 2), side=2, unit_m=0.0005), expected, rtol=1e-5)
    stream = io.BytesIO()
    torch.save(torch.from_numpy(millimetres / 1000), stream)
    assert torch.allclose(load_depth(stream.getvalue(), side=2), expected, rtol=1e-5)


def test_unknown_depths_have_no_disparity_and_near_ones_the_largest():
    found = load_depth(npy(np.array([[0.0, np.nan], [0.01, 0.001]])), side=2)[0]
    assert torch.allclose(found[0], torch.tensor(-0.0418 / 0.0295))
    assert torch.allclose(found[1], torch.tensor((1 - 0.0418) / 0.0295))


def test_the_short_side_is_resized_and_the_centre_cropped():
    metres = np.repeat(np.arange(1.0, 13.0)[None], 4, axis=0)  # [4, 12]
    found = load_depth(npy(metres), side=4)[0]
    assert torch.allclose(found, torch.tensor(disparity(metres[:, 4:8]), dtype=torch.float32), rtol=1e-5)
    assert load_depth(npy(metres)).shape == (1, 224, 224)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(np.zeros((4, 4))), "it has no depth above 0"),
        (npy(np.zeros((4, 4, 3))), r"its shape is \(4, 4, 3\) of float64"),
        (b"text", "it is no PNG, TIFF, PGM, .npy or .pt file"),
    ],
)
def test_what_is_no_depth_map_is_told(data, reason):
    with pytest.raises(MediaError, match=rf"cannot use the depth '\d+ bytes': {reason}"):
        load_depth(data)
