"""Ask a model what a benchmark asks, and look at what it does."""
