"""Turn the options of `llava-lite serve` into a server that answers until it is stopped."""

import ipaddress
import logging
import os
import signal
import socket
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from llava_lite.conversation import get_template
from llava_lite.inference import load
from llava_lite.model.placement import check_device
from llava_lite.serve.api.images import ImageLimits
from llava_lite.serve.listening import listen
from llava_lite.serve.memory import check_memory

logger = logging.getLogger(__name__)

KEY_VARIABLE = "LLAVA_LITE_API_KEY"


def serve(options) -> None:
    """Load the model and serve it; what is wrong shows before minutes of loading.

    Raises ValueError or OSError, in a sentence, for a wrong option, a port in use, a model that is not there or does
    not fit into memory; ImportError without the extra.
    """
    check_extra()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    check_options(options)
    check_device(options.device)
    if options.conv_mode is not None:
        get_template(options.conv_mode)
    listener = listen(options.host, options.port)
    with listener:
        check_memory([options.model], options)
        model, processor = load(
            options.model,
            device=options.device,
            model_base=options.model_base,
            load_8bit=options.load_8bit,
            load_4bit=options.load_4bit,
            **({"revision": options.revision} if options.revision else {}),
        )
        with running(model, processor, options) as app:
            announce(options, listener)
            run(app, listener)


@contextmanager
def running(model, processor, options):
    """Yield the application of a model, whose engine runs meanwhile."""
    # Imported here: without the extra these names do not exist.
    from llava_lite.serve.api.app import Settings, build_app
    from llava_lite.serve.api.engine import Engine
    from llava_lite.serve.api.metrics import Metrics
    from llava_lite.serve.api.prompts import Prompts

    limits = ImageLimits(
        max_images=options.max_images,
        max_bytes=options.max_image_bytes,
        max_pixels=options.max_image_pixels,
        hosts=frozenset(options.allow_host),
    )
    if options.conv_mode is not None:
        processor.conv_template = options.conv_mode
    settings = Settings(model_name(options), api_key(options), options.timeout)
    engine = Engine(model, processor, Metrics(), options.max_batch, options.max_queue, not options.inexact)
    if engine.why_alone is not None:
        logger.warning("Answers are generated one after another: %s.", engine.why_alone)
    elif engine.is_exact and model.dtype in (torch.float16, torch.bfloat16) and options.max_batch > 1:
        logger.warning(
            "In %s, rounding in a batch may change most answers, which are then generated again alone. --inexact "
            "keeps them as they are; --max-batch 1 asks for no batches.",
            str(model.dtype).removeprefix("torch."),
        )
    app = build_app(engine, Prompts(model, processor, limits, options.max_new_tokens), settings)
    engine.start()
    try:
        yield app
    finally:
        app.state.calls.readers.close()
        engine.close()


def run(app, listener: socket.socket, on_start=None) -> None:
    """Answer at a socket until the process is told to stop. on_start: called with uvicorn's server."""
    from llava_lite.serve.api.graceful import build_server

    server = build_server(app)
    if on_start is not None:
        on_start(server)
    # uvicorn ends its requests at a signal, and then raises it once more.
    with suppress(KeyboardInterrupt), sigterm_as_interrupt():
        server.run(sockets=[listener])


@contextmanager
def sigterm_as_interrupt():
    """Let SIGTERM be what Ctrl-C is; as it is by default, it would end the process before the model's thread ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_extra() -> None:
    """Raise ImportError that names the extra if a library of it is missing."""
    try:
        import fastapi
        import prometheus_client
        import uvicorn
    except ImportError as error:
        raise ImportError(
            f"{error.name} is not installed; install the extra: pip install 'llava-lite[serve]'."
        ) from error
    del fastapi, prometheus_client, uvicorn


def check_options(options) -> None:
    """Raise ValueError for an option that needs no model to be found wrong."""
    api_key(options)
    model_name(options)


def model_name(options) -> str:
    """Return how requests name the model; ValueError for no name at all."""
    name = options.served_model_name
    if name is None:
        name = os.path.basename(os.path.normpath(options.model))
        # ".", "..", and what leads up again have no name of their own.
        name = Path(options.model).resolve().name if name in ("", ".", "..") else name
    if not name.strip():
        raise ValueError("the model has no name in requests; give one by --served-model-name.")
    return name


def api_key(options) -> str | None:
    """Return the key of --api-key, else that of the environment; ValueError for one that no client can send."""
    key = options.api_key if options.api_key is not None else os.environ.get(KEY_VARIABLE)
    if key is None:
        return None
    key = key.strip()
    if not key:
        raise ValueError(f"the API key is empty; give one by --api-key or {KEY_VARIABLE}, or leave both out.")
    wrong = sorted({character for character in key if not (character.isascii() and character.isprintable())})
    if wrong:
        raise ValueError(
            f"the API key has {', '.join(f'{one!r} (U+{ord(one):04X})' for one in wrong)}, which clients cannot send "
            "in a header; use letters, digits and punctuation of ASCII."
        )
    return key


def announce(options, listener: socket.socket) -> None:
    """Log where the server is, and warn if others can reach it."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    logger.info("Serving %s at http://%s:%d/v1 (Ctrl-C stops it).", model_name(options), shown, port)
    if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        guard = "whoever has the key" if api_key(options) else "anyone who reaches it (there is no --api-key)"
        logger.warning("%s is not this machine alone: %s may ask, and nothing is encrypted.", shown, guard)
