"""Checkpoints of a run: written, found again, resumed from."""
