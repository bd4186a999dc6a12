"""The flags of each verb of `llava-lite`, apart from what the verb does, so that reading them imports no torch."""
