"""Readers of other formats for `llava-lite data convert`: each yields LLaVA's records, or why it cannot."""
