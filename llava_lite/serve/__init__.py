"""Ways to chat with a model: a terminal chat, OpenAI's API, and a web page."""
