"""Write a model for another program, or merge its parts, and prove that it gives the same answers."""
