"""Replace image placeholders by image features."""
