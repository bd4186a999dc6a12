"""What the ranks of a run share: values, errors, partitioned weights."""
