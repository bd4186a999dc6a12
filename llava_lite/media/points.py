"""Turn the file of a point cloud into its points [N, 3], told by its content and not by its name."""

from __future__ import annotations

import numpy as np
import torch

from llava_lite.media.files import MediaError, check_finite, is_array_file, name_source, read_array, read_bytes
from llava_lite.media.ply import OtherPly, read_ply

KINDS = "a .npy file, a tensor that torch saved, .ply, .obj, .xyz or .pts"


def load_points(source, min_points=1) -> torch.Tensor:
    """Return the points of a cloud, float32 [N, 3], as they are in the file: neither sampled, centred nor scaled.

    source: path or bytes. Of more than three numbers a point (normals, colours) the first three are read. Clouds of
    unequal N cannot be stacked: encode each. min_points: the least N that the encoder reads. Raises MediaError with
    the path for a file that holds no points, fewer, or some that are not finite.
    """
    data = read_bytes("point cloud", source)
    points = parse(source, data)
    if points.ndim != 2 or points.shape[1] < 3 or not len(points):
        reason = f"it holds an array of shape {points.shape}; points are [N, 3], x, y and z."
        raise MediaError("point cloud", name_source(source), reason)
    if len(points) < min_points:
        reason = f"it holds {len(points)} points; the encoder reads at least {min_points}."
        raise MediaError("point cloud", name_source(source), reason)
    points = np.ascontiguousarray(points[:, :3]).astype(np.float32)
    check_finite("point cloud", source, points)
    return torch.from_numpy(points)


def parse(source, data: bytes) -> np.ndarray:
    """Return the numbers of a file, a row a point."""
    if is_array_file(data):
        return read_array("point cloud", source, data)
    try:
        if data.startswith(b"ply"):
            return read_ply(data)
        text = data.decode("utf-8")
        rows = [line.split("#")[0].replace(",", " ").split() for line in text.splitlines()]
        return read_rows([row for row in rows if row])
    except OtherPly as error:
        raise MediaError("point cloud", name_source(source), f"{error}.") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise MediaError("point cloud", name_source(source), f"it is none of {KINDS}.") from error


def read_rows(rows: list[list[str]]) -> np.ndarray:
    """Return the vertices of .obj lines, else a row of numbers a line; .pts begins with their count."""
    vertices = [row[1:4] for row in rows if row[0] == "v"]
    if vertices:
        return np.array(vertices, dtype=np.float64)
    if rows and len(rows[0]) == 1:
        rows = rows[1:]
    return np.array(rows, dtype=np.float64)
