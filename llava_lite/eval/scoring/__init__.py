"""Turn answers into scores by the rules of each benchmark: pure functions, no model and no files."""
