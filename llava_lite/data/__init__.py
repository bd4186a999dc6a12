"""From annotation files and images to batches: records, index, check, dataset, collator, sampler."""
