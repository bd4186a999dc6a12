"""Stop a server in order: running requests get time to end, and whoever is left a response that says why."""

import asyncio
import logging

logger = logging.getLogger(__name__)

# Requests that are still running when the server is stopped may go on for so long.
SHUTDOWN_S = 5
# Clients have so long to take the response that the server is stopping.
CLOSE_S = 2
TICK_S = 0.05


def build_server(app):
    """Return a uvicorn server of an application of `build_app`, which ends its requests as said above."""
    # Imported here, and the class made here: without the extra its parent does not exist.
    import uvicorn

    class GracefulServer(uvicorn.Server):
        """A uvicorn server of an application of `build_app`. A second Ctrl-C gives up the running requests at once."""

        def __init__(self, app):
            self.calls, self.is_hurried = app.state.calls, False
            config = uvicorn.Config(
                without_traceback(app, self.calls), log_level="warning", timeout_graceful_shutdown=SHUTDOWN_S + CLOSE_S
            )
            super().__init__(config)

        def handle_exit(self, sig, frame):
            """Stop at the first signal, give the requests up at the second, and leave at the third."""
            if self.should_exit and not self.is_hurried:
                self.is_hurried = True
            else:
                super().handle_exit(sig, frame)

        async def shutdown(self, sockets=None):
            """Take no new connections, and end the running requests in time."""
            ending = asyncio.ensure_future(self._end_calls())
            try:
                await super().shutdown(sockets)
            finally:
                ending.cancel()

        async def _end_calls(self) -> None:
            end = asyncio.get_running_loop().time() + SHUTDOWN_S
            if count := len(self.calls.running):
                what = "1 request is" if count == 1 else f"{count} requests are"
                logger.info("Stopping; %s running and may take %d s more (Ctrl-C again: none).", what, SHUTDOWN_S)
            while self.calls.running and not self.is_hurried and asyncio.get_running_loop().time() < end:
                await asyncio.sleep(TICK_S)
            self.calls.stop()

    return GracefulServer(app)


def without_traceback(app, calls):
    """Return an application whose requests end in silence where uvicorn cancels them, which is after `calls.stop`."""

    async def call(scope, receive, send):
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            if not calls.is_stopping:
                raise

    return call
