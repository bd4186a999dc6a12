"""The records that a run reads: annotation files, shards, cached features."""
