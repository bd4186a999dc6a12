"""Ways to chat with a model: a terminal chat, and OpenAI's API."""
