"""LLaVA's names for training data, order and state."""
