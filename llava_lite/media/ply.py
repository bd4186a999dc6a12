"""Read the vertices of a .ply file, in text or binary, by numpy alone."""

from __future__ import annotations

import numpy as np

TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2"},
    **{"int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"},
}
ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}


class OtherPly(ValueError):
    """A .ply file without vertices that can be read: the reason."""


def read_ply(data: bytes) -> np.ndarray:
    """Return x, y and z of the vertices, float64 [N, 3]; OtherPly with the reason if they cannot be read."""
    header, end, body = data.partition(b"end_header")
    if not end:
        raise OtherPly("its .ply header has no end_header")
    order, elements = read_header(header.decode("ascii", "replace").splitlines())
    body = body.removeprefix(b"\r").removeprefix(b"\n")
    lines = body.decode("ascii", "replace").splitlines() if not order else []
    for name, count, fields in elements:
        has_list = any(kind == "list" for _, kind in fields)
        if name == "vertex":
            if has_list or not {"x", "y", "z"} <= {field for field, _ in fields}:
                raise OtherPly(f"its vertices have {[field for field, _ in fields]}, not x, y and z")
            rows = read_lines(lines, count, fields) if not order else read_binary(body, count, fields, order)
            return np.stack([rows[axis].astype(np.float64) for axis in "xyz"], axis=1)
        if not order:
            lines = lines[count:]
        elif has_list:
            raise OtherPly(f"lists of {name!r} stand before its vertices. Write the vertices first")
        else:
            body = body[count * np.dtype([(field, TYPES[kind]) for field, kind in fields]).itemsize :]
    raise OtherPly("it has no vertices")


def read_header(lines: list[str]) -> tuple[str, list[tuple[str, int, list[tuple[str, str]]]]]:
    """Return the byte order ("" for text) and [(element, count, [(property, type)])]."""
    order, elements = None, []
    for words in (line.split() for line in lines):
        if words[:1] == ["format"]:
            order = ORDERS.get(words[1]) if len(words) > 1 else None
        elif words[:1] == ["element"] and len(words) == 3 and words[2].isdigit():
            elements.append((words[1], int(words[2]), []))
        elif words[:1] == ["property"] and elements and len(words) > 2:
            if words[1] != "list" and words[1] not in TYPES:
                raise OtherPly(f"its property {words[-1]!r} has the unknown type {words[1]!r}")
            elements[-1][2].append((words[-1], words[1]))
    if order is None:
        raise OtherPly(f"its .ply format is none of {', '.join(ORDERS)}")
    return order, elements


def read_lines(lines, count, fields) -> dict[str, np.ndarray]:
    """Return {property: values [N]} of vertices in text."""
    rows = [line.split() for line in lines if line.strip()][:count]
    if len(rows) < count or any(len(row) < len(fields) for row in rows):
        raise OtherPly(f"it ends before its {count} vertices")
    columns = np.array([row[: len(fields)] for row in rows], dtype=np.float64).reshape(count, len(fields)).T
    return {field: column for (field, _), column in zip(fields, columns, strict=True)}


def read_binary(body, count, fields, order) -> np.ndarray:
    """Return the vertices as a structured array."""
    row = np.dtype([(field, order + TYPES[kind]) for field, kind in fields])
    if len(body) < count * row.itemsize:
        raise OtherPly(f"it ends before its {count} vertices")
    return np.frombuffer(body, row, count)
