"""Open checkpoints: configs, weights, tokenizers, and what was trained on top of a base model."""
