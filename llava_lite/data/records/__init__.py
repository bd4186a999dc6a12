"""One object of an annotation file as a Record, in any of the spellings that are read."""
