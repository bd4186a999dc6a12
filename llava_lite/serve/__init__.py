"""Ways to talk to a model: a terminal chat."""
