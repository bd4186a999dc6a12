"""The flags of a run: fields, validation, other spellings, help."""
