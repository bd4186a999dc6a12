"""Names of foreign checkpoints and ours, one file a format, pure functions."""
