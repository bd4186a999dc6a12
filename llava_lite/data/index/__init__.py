"""Annotation files as records by position, read through an index on disk."""
