"""WebDataset, parquet and Arrow shards as an endless stream of micro-batches."""
