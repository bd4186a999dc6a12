"""A judge on this machine: an HTTP server with OpenAI's chat completions that says what a test wants."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ToyJudge:
    """What a server was asked, and its address; `failures` are (status, text, headers) of the next answers."""

    def __init__(self, answer):
        self.answer, self.failures, self.requests, self.headers = answer, [], [], []
        self.address = ""

    @property
    def prompts(self) -> list[str]:
        """Return the last message of each request that was answered."""
        return [request["messages"][-1]["content"] for request in self.requests]


@contextmanager
def serve(answer):
    """Yield a ToyJudge whose text is answer(request), on a port of its own."""
    judge = ToyJudge(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            judge.headers.append((self.path, dict(self.headers)))
            if judge.failures:
                status, text, headers = judge.failures.pop(0)
                if status is None:
                    # The server goes away in the middle.
                    self.close_connection = True
                    return
            else:
                request = json.loads(body)
                judge.requests.append(request)
                content = {"role": "assistant", "content": judge.answer(request)}
                status, text, headers = 200, json.dumps({"choices": [{"message": content}]}), {}
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        judge.address = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield judge
        server.shutdown()
