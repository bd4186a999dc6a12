"""The page of a run's first batches: what `llava-lite check --show` writes."""
