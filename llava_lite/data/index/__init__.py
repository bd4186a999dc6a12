"""Annotation files as records by position, read through an index on disk."""

from llava_lite.data.index.annotations import open_annotations

__all__ = ["open_annotations"]
