"""Run `llava-lite serve` for a model in this process, in a thread, and ask it with OpenAI's own client."""

import base64
import io
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

from llava_lite.commands.serve import build_parser
from llava_lite.serve.api.server import listen, run, running

KEY = "secret"


@contextmanager
def serving(model, processor, *flags):
    """Yield the address, the application and a client of a server with flags of `llava-lite serve`."""
    from openai import OpenAI

    options = build_parser().parse_args(["toy", "--port", "0", "--api-key", KEY, *flags])
    servers = []
    with listen(options.host, options.port) as listener, running(model, processor, options) as app:
        thread = threading.Thread(target=run, args=(app, listener, servers.append))
        thread.start()
        try:
            while not (servers and servers[0].started):
                assert thread.is_alive()
                time.sleep(0.01)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            # The environment may name a proxy; this machine is asked without one.
            with OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
                yield SimpleNamespace(url=url, app=app, client=client, port=listener.getsockname()[1])
        finally:
            servers[0].should_exit = True
            thread.join()


def data_url(image) -> str:
    """Return an image as a data URL."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def show(*images, text="What colour is the square?"):
    """Return a list with one message of the user: images and a text."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
