"""Sparse experts in the place of a decoder layer's MLP."""
