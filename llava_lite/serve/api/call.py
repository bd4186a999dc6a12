"""Answer one chat request, from its first byte to the last of its response."""

import asyncio
import json
import time
import uuid
from dataclasses import dataclass, field

import torch

from llava_lite.serve.api.body import Bodies, check_text_bytes, read_json
from llava_lite.serve.api.chat_request import ChatRequest, shorten
from llava_lite.serve.api.engine import Engine, QueueFull
from llava_lite.serve.api.errors import RequestError
from llava_lite.serve.api.readers import Readers

CLIENT_LEFT = 499


@dataclass(frozen=True)
class Settings:
    """name: of the model, as clients write it. api_key: None for none. timeout_s: of a whole request."""

    name: str
    api_key: str | None = None
    timeout_s: float = 300.0


class ClientLeft(Exception):
    """Nobody waits for the response."""


@dataclass
class Calls:
    """The requests that are being answered, and what they share."""

    engine: Engine
    bodies: Bodies
    readers: Readers
    settings: Settings
    running: set["Call"] = field(default_factory=set)
    is_stopping: bool = False

    def stop(self) -> None:
        """Give up all requests, and those that come: each gets status 503, or an error event in a stream."""
        self.is_stopping = True
        for call in list(self.running):
            call.give_up(ServerStops())


class ServerStops(Exception):
    """The server was told to stop, and the time for the running requests is over."""


class Call:
    """One chat request."""

    def __init__(self, calls: Calls):
        self.calls, self.engine, self.settings = calls, calls.engine, calls.settings
        self.loop, self.events = asyncio.get_running_loop(), asyncio.Queue()
        self.started = time.monotonic()
        self.answers, self.leaver, self.has_text = [], None, False
        self.num_reserved = 0
        # What the request waits for, and why it waits no longer.
        self._task: asyncio.Task | None = None
        self._reason: Exception | None = ServerStops() if calls.is_stopping else None
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.settings.name}

    async def respond(self, request):
        """Return the body of a response as a dict, or an iterator of the events of a stream."""
        streams = False
        self.calls.running.add(self)
        try:
            # A full queue is reported before a body is received; a place is taken once it is complete.
            self.engine.check_room(1)
            asked = await self._wait(self._read(request))
            self._reserve(asked.n)
            self.leaver = asyncio.ensure_future(self._watch(request))
            await self._wait(self._submit(asked))
            asked = asked.without_messages()
            streams = asked.stream
            return self._stream(asked) if streams else await self._whole(asked)
        except BaseException as error:
            refusal = as_refusal(error)
            self._count(refusal.status)
            if not isinstance(error, Exception):
                raise
            raise refusal from error
        finally:
            if not streams:
                self._end()

    def give_up(self, reason: Exception) -> None:
        """Wait for nothing more: raise the reason where the request waits."""
        self._reason = self._reason or reason
        if self._task is not None:
            self._task.cancel()

    async def _read(self, request) -> ChatRequest:
        """Return what the body of a request asks for."""
        asked = ChatRequest.read(read_json(await self.calls.bodies.receive(request)))
        check_name(asked.model, self.settings)
        check_text_bytes(sum(len(text.encode("utf-8", "replace")) for text in asked.texts()))
        places = self.engine.max_waiting
        if asked.n > places:
            message = f"n is {asked.n}; each answer needs one of the {places} places in the queue (--max-queue of the "
            raise RequestError(f"{message}server). Ask for at most {places}.", param="n", code="invalid_value")
        return asked

    async def _submit(self, asked: ChatRequest) -> None:
        """Queue the answers of a request."""
        answers = await self.calls.readers.answers(asked, [self._sender(i) for i in range(asked.n)])
        self.answers, self.num_reserved = answers, 0
        self.engine.submit(self.answers)
        self.engine.metrics.prompt_tokens.inc(self.answers[0].prompt_len)

    def _reserve(self, num_answers: int) -> None:
        self.engine.reserve(num_answers)
        self.num_reserved += num_answers

    def _sender(self, index: int):
        def send(event):
            # The loop is closed where the server has stopped meanwhile.
            if not self.loop.is_closed():
                self.loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

        return send

    async def _watch(self, request) -> None:
        """Give the answers up as soon as the client leaves."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.engine.leave(self.answers)
        self.give_up(ClientLeft())

    async def _wait(self, work):
        """Return what some work returns; raise where the time is over, the client leaves or the server stops."""
        task = self._task = asyncio.ensure_future(work)
        if self._reason is not None:
            task.cancel()
        try:
            await asyncio.wait({task}, timeout=self.settings.timeout_s - (time.monotonic() - self.started))
        finally:
            self._task = None
            if not task.done():
                task.cancel()
        if not task.done():
            raise TimeoutError
        if task.cancelled() and self._reason is not None:
            raise self._reason
        return task.result()

    async def _events(self):
        """Yield (index of the answer, event) until all answers have ended; raise what went wrong."""
        left = len(self.answers)
        while left:
            index, event = await self._wait(self.events.get())
            if event[0] == "error":
                raise event[1]
            if event[0] == "piece" and event[1] and not self.has_text:
                self.has_text = True
                self.engine.metrics.first_token_seconds.observe(time.monotonic() - self.started)
            left -= event[0] == "end"
            yield index, event

    async def _whole(self, asked: ChatRequest) -> dict:
        """Return the body of a response."""
        entries, ends = [[] for _ in self.answers], {}
        async for index, (kind, *values) in self._events():
            if kind == "piece":
                entries[index] += values[1]
            else:
                ends[index] = values
        choices = []
        for index, (text, reason, _) in sorted(ends.items()):
            logprobs = None if asked.num_top is None else {"content": entries[index], "refusal": None}
            message = {"role": "assistant", "content": text, "refusal": None}
            choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
        usage = self._usage(count for *_, count in ends.values())
        self._count(200)
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage}

    async def _stream(self, asked: ChatRequest):
        """Yield the events of a stream as bytes; an error after the first one is an event too."""
        counts = {}
        status = CLIENT_LEFT
        try:
            for index in range(asked.n):
                yield self._chunk(asked, index, {"role": "assistant", "content": ""})
            async for index, (kind, *values) in self._events():
                if kind == "piece":
                    yield self._chunk(asked, index, {"content": values[0]}, values[1])
                else:
                    counts[index] = values[2]
                    yield self._chunk(asked, index, {}, reason=values[1])
            usage = self._usage(counts.values())
            status = 200
            if asked.include_usage:
                yield self._event({"choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
        except Exception as error:
            refusal = as_refusal(error)
            status = refusal.status
            yield b"data: " + json.dumps(refusal.body).encode() + b"\n\n"
        finally:
            self._count(status)
            self._end()

    def _chunk(self, asked: ChatRequest, index: int, delta: dict, entries=(), reason=None) -> bytes:
        logprobs = {"content": list(entries), "refusal": None} if entries else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._event({"choices": [choice], **({"usage": None} if asked.include_usage else {})})

    def _event(self, fields: dict) -> bytes:
        return b"data: " + json.dumps({**self.head, "object": "chat.completion.chunk", **fields}).encode() + b"\n\n"

    def _usage(self, counts) -> dict:
        prompt, generated = self.answers[0].prompt_len, sum(counts)
        self.engine.metrics.generated_tokens.inc(generated)
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    def _count(self, status: int) -> None:
        self.engine.metrics.requests.labels(status=str(status)).inc()
        self.engine.metrics.request_seconds.observe(time.monotonic() - self.started)

    def _end(self) -> None:
        """Free what is still generated for this request."""
        self.calls.running.discard(self)
        if self.leaver is not None:
            self.leaver.cancel()
        self.engine.release(self.num_reserved)
        self.num_reserved = 0
        self.engine.leave(self.answers)


def check_name(name: str, settings: Settings) -> None:
    """Raise RequestError for a model that is not served."""
    if name != settings.name:
        message = f"There is no model {shorten(name)}; this server has {shorten(settings.name)}."
        raise RequestError(message, 404, "model", "model_not_found")


def as_refusal(error: BaseException) -> RequestError:
    """Return an error as one of the API; what is no Exception ends a request whose client has left."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, QueueFull):
        return RequestError(str(error), 429, code="queue_full")
    # Not the same class in Python 3.10.
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        message = "The answer was not ready in time (--timeout of the server); ask for a shorter one, or later."
        return RequestError(message, 504, code="timeout")
    if isinstance(error, torch.OutOfMemoryError):
        message = "The device has no memory left for this request; ask for less, or try again later."
        return RequestError(message, 503, code="out_of_memory")
    if isinstance(error, (ServerStops, ConnectionAbortedError)):
        return RequestError("The request was given up: the server is stopping.", 503, code="server_stopping")
    # Starlette raises its own where the client leaves in the middle of the body.
    if type(error).__name__ in ("ClientLeft", "ClientDisconnect") or not isinstance(error, Exception):
        return RequestError("The client left.", CLIENT_LEFT)
    return RequestError(f"The model failed ({type(error).__name__}); the log of the server says why.", 500)
