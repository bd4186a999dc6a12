"""From annotation files and pictures to batches: records, index, check, dataset, collator, sampler."""
