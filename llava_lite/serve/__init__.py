"""Ways to chat with a model: a terminal chat, and a web page."""
