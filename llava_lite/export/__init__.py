"""Turn a model into a folder that another program opens, or into a whole one, and prove that it answers the same."""
