"""Receive the bodies of requests and read them as JSON, within bounds on their size, their number and their time.

What clients have sent of a body is all that they hold: a place in the queue is taken once the body is complete.
"""

import asyncio
import json
from dataclasses import dataclass, field

from llava_lite.serve.api.errors import RequestError

# What a request may have beside its images.
MAX_TEXT_BYTES = 2**20
# In base64 3 bytes are 4 letters; line breaks, as JSON writes them, and the head of the data URL come on top.
BYTES_OF_ENCODED, BYTES_OF_HEAD = 1.5, 1024
# Texts that may be images, as they begin in JSON. A shorter one counts as text: many of them would fill the memory.
IMAGE_STARTS, LEAST_IMAGE_BYTES = (b'"data:', b'"DATA:', b'"Data:'), 256
# A body must be complete after so long, or after the time of a request if that is shorter.
RECEIVE_S = 60
# Bodies that may be incomplete at one time, and how many times the longest one they may have together.
MAX_BODIES, MAX_LONGEST = 256, 4
MAX_DIGITS = 400


@dataclass(eq=False)
class Body:
    """A body of which more is to come. task: receives it. is_given_up: whether it had to make room for others."""

    data: bytearray = field(default_factory=bytearray)
    task: asyncio.Task | None = None
    is_given_up: bool = False


class Bodies:
    """Receives bodies. Where too many are incomplete, the one that began first is given up.

    So clients that send half a body keep nobody out. limits: ImageLimits. timeout_s: of a request.
    """

    def __init__(self, limits, timeout_s: float, max_bodies: int = MAX_BODIES):
        self.longest = MAX_TEXT_BYTES + limits.max_images * int(limits.max_bytes * BYTES_OF_ENCODED + BYTES_OF_HEAD)
        self.max_bodies, self.max_bytes = max_bodies, MAX_LONGEST * self.longest
        self.timeout_s = min(timeout_s, RECEIVE_S)
        # In the order in which they began.
        self._open: dict[Body, None] = {}

    async def receive(self, request) -> bytearray:
        """Return the body of a request; RequestError if it is too long, or not complete in time."""
        self._check_len(int(request.headers.get("content-length", 0)))
        body = Body()
        self._open[body] = None
        body.task = asyncio.ensure_future(self._collect(body, request))
        try:
            self._make_room()
            await asyncio.wait({body.task}, timeout=self.timeout_s)
        finally:
            self._open.pop(body, None)
            if not body.task.done():
                body.task.cancel()
        if body.is_given_up:
            raise RequestError("Too many bodies are incomplete, and this one began first. Send it again.", 408)
        if not body.task.done():
            raise RequestError(f"The body was not complete after {self.timeout_s:g} s.", 408)
        body.task.result()
        return body.data

    async def _collect(self, body: Body, request) -> None:
        async for part in request.stream():
            body.data += part
            self._check_len(len(body.data))
            self._make_room()

    def _check_len(self, size: int) -> None:
        if size > self.longest:
            raise RequestError(f"The body has more than {self.longest:,} bytes.", 413)

    def _make_room(self) -> None:
        while len(self._open) > self.max_bodies or sum(len(body.data) for body in self._open) > self.max_bytes:
            first = next(iter(self._open))
            del self._open[first]
            first.is_given_up = True
            first.task.cancel()


def read_json(body: bytearray):
    """Return the value of a body; RequestError for what is no JSON, and for too much beside the images."""
    # Before it is read: as objects, a text of JSON may be twenty times as large.
    check_text_bytes(len(body) - image_bytes(body))
    try:
        return json.loads(body, parse_int=read_int)
    except UnicodeDecodeError as error:
        raise RequestError("The body is no JSON (it is not UTF-8).") from error
    except RecursionError as error:
        raise RequestError("The body is nested too deeply.") from error
    except ValueError as error:
        raise RequestError(f"The body is no JSON ({error}).") from error


def check_text_bytes(size: int) -> None:
    """Raise RequestError for more text than a request may have."""
    if size > MAX_TEXT_BYTES:
        message = f"The body has {size:,} bytes beside its images; this server takes at most {MAX_TEXT_BYTES:,}."
        raise RequestError(message, 413)


def image_bytes(body: bytearray) -> int:
    """Return how many bytes of a body are texts that may be images."""
    total = 0
    for start in IMAGE_STARTS:
        at = body.find(start)
        while at >= 0:
            end = body.find(b'"', at + 1)
            end = len(body) if end < 0 else end
            total += end - at if end - at >= LEAST_IMAGE_BYTES else 0
            at = body.find(start, end)
    return total


def read_int(digits: str) -> int:
    """Return a whole number of JSON; RequestError for one that is longer than any field takes."""
    if len(digits) > MAX_DIGITS:
        raise RequestError(f"The body has a number of {len(digits):,} digits; no field takes one of {MAX_DIGITS}.")
    return int(digits)
