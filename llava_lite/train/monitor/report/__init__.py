"""The page of a run: what it was, what it saw, what trained, how it went, and what it cost."""
