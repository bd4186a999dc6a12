"""Answer HTTP requests in the form of OpenAI's chat API: from a request to the answers of a shared batch."""
