"""Vertices of .ply files written by hand, in text and in both byte orders."""

import struct

import numpy as np
import pytest

from llava_lite.media.ply import OtherPly, read_ply

POINTS = [(0.5, -1.0, 2.0), (3.0, 0.25, -0.125)]


def binary(order, axis="float", before=b"", header_before=""):
    words = {"<": "binary_little_endian", ">": "binary_big_endian"}[order]
    header = f"ply\r\nformat {words} 1.0\r\ncomment by hand\r\n{header_before}element vertex 2\r\n"
    header += f"property uchar red\r\nproperty {axis} z\r\nproperty {axis} y\r\nproperty {axis} x\r\n"
    header += "element face 1\r\nproperty list uchar int vertex_indices\r\nend_header\r\n"
    code = {"float": "f", "double": "d", "float64": "d"}[axis]
    rows = b"".join(struct.pack(f"{order}B3{code}", 200, z, y, x) for x, y, z in POINTS)
    return header.encode() + before + rows + struct.pack(f"{order}B3i", 3, 0, 1, 0)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("axis", ["float", "double", "float64"])
def test_binary_vertices_in_any_order_of_properties(order, axis):
    assert np.array_equal(read_ply(binary(order, axis)), POINTS)


def test_elements_before_the_vertices_are_passed_over():
    before = struct.pack("<2hf", 1, 2, 3.0)
    header = "element sensor 1\r\nproperty short a\r\nproperty int16 b\r\nproperty float c\r\n"
    assert np.array_equal(read_ply(binary("<", before=before, header_before=header)), POINTS)
    with pytest.raises(OtherPly, match="lists of 'strip' stand before its vertices"):
        read_ply(binary("<", header_before="element strip 1\r\nproperty list uchar int ids\r\n"))
    text = "ply\nformat ascii 1.0\nelement sensor 1\nproperty float a\nelement vertex 1\nproperty float x\n"
    text += "property float y\nproperty float z\nend_header\n9\n1 2 3\n"
    assert np.array_equal(read_ply(text.encode()), [(1, 2, 3)])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (binary("<")[:-20], "it ends before its 2 vertices"),
        (
            b"ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\n"
            b"end_header\n1 2 3\n",
            "it ends before its 2",
        ),
        (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n1\n", r"its vertices have \['x'\]"),
        (b"ply\nformat morse 1.0\nend_header\n", "format is none of ascii, binary_little_endian"),
        (b"ply\nformat ascii 1.0\nend_header\n", "it has no vertices"),
        (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty word x\nend_header\n", "'x' has the unknown type 'word'"),
    ],
)
def test_what_cannot_be_read_is_told(data, reason):
    with pytest.raises(OtherPly, match=reason):
        read_ply(data)
