"""The processor: prompts and images to the inputs of a model."""
