"""The Hugging Face Hub: what its client raises, and how a directory is uploaded."""
