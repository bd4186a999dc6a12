"""The model card, and the upload at the end of a run."""
