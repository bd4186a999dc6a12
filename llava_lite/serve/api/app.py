"""Answer HTTP requests in the form of OpenAI's chat API: routes, the key, errors, and events of a stream."""

import asyncio
import hmac
import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from llava_lite.serve.api.chat_request import ChatRequest
from llava_lite.serve.api.engine import Engine, QueueFull
from llava_lite.serve.api.errors import RequestError, error_body
from llava_lite.serve.api.prompts import Prompts

# Threads that fetch and decode images and write prompts.
NUM_READERS = 4
# What a request may have beside its images.
MAX_TEXT_BYTES = 2**20
CLIENT_LEFT = 499


@dataclass(frozen=True)
class Settings:
    """name: of the model, as clients write it. api_key: None for none. timeout_s: of a whole request."""

    name: str
    api_key: str | None = None
    timeout_s: float = 300.0


class ClientLeft(Exception):
    """Nobody waits for the response."""


def build_app(engine: Engine, prompts: Prompts, settings: Settings):
    """Return the FastAPI application of an engine that has been started."""
    from fastapi import APIRouter, Depends, FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException

    app = FastAPI(title="llava_lite", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.engine, created = engine, int(time.time())
    readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="reader")

    async def check_key(request: Request):
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        wanted = settings.api_key
        if wanted is None:
            return
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), wanted.encode()):
            message = "The API key is missing or wrong; send Authorization: Bearer KEY."
            raise RequestError(message, 401, code="invalid_api_key")

    guarded = APIRouter(dependencies=[Depends(check_key)])

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError):
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status)
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException):
        message = f"{request.method} {request.url.path}: {error.detail}."
        return JSONResponse(error_body(message, error.status_code), error.status_code, error.headers)

    @app.get("/health")
    async def health():
        alive = engine.is_alive
        return JSONResponse({"status": "ok" if alive else "the model's thread has ended"}, 200 if alive else 503)

    @guarded.get("/metrics")
    async def metrics():
        return Response(engine.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def model_entry():
        return {"id": settings.name, "object": "model", "created": created, "owned_by": "llava_lite"}

    @guarded.get("/v1/models")
    async def models():
        return {"object": "list", "data": [model_entry()]}

    @guarded.get("/v1/models/{name:path}")
    async def model(name: str):
        check_name(name, settings)
        return model_entry()

    @guarded.post("/v1/chat/completions")
    async def chat(request: Request):
        call = Call(engine, prompts, settings, readers)
        response = await call.respond(request)
        if isinstance(response, dict):
            return JSONResponse(response)
        return StreamingResponse(response, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    app.include_router(guarded)
    return app


def check_name(name: str, settings: Settings) -> None:
    """Raise RequestError for a model that is not served."""
    if name != settings.name:
        message = f"There is no model {name!r}; this server has {settings.name!r}."
        raise RequestError(message, 404, "model", "model_not_found")


class Call:
    """One chat request, from its first byte to the last of its response."""

    def __init__(self, engine: Engine, prompts: Prompts, settings: Settings, readers: ThreadPoolExecutor):
        self.engine, self.prompts, self.settings, self.readers = engine, prompts, settings, readers
        self.loop, self.events = asyncio.get_running_loop(), asyncio.Queue()
        self.started = time.monotonic()
        self.answers, self.leaver, self.has_text = [], None, False
        self.num_reserved = 0
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": settings.name}

    async def respond(self, request):
        """Return the body of a response as a dict, or an iterator of the events of a stream."""
        streams = False
        try:
            # Before the body is read: those who wait are bounded, and so is what they have sent.
            self._reserve(1)
            asked = await self._within_time(self._read(request))
            self._reserve(asked.n - 1)
            self.leaver = asyncio.ensure_future(self._watch(request))
            await self._within_time(self._submit(asked))
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

    async def _read(self, request) -> ChatRequest:
        """Return what the body of a request asks for."""
        limits = self.prompts.limits
        # In base64, 3 bytes are 4 letters.
        longest = MAX_TEXT_BYTES + limits.max_images * (limits.max_bytes * 4 // 3 + 1024)
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > longest:
                raise RequestError(f"The body has more than {longest:,} bytes.", 413)
        try:
            fields = json.loads(bytes(body))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"The body is no JSON ({error}).") from error
        asked = ChatRequest.read(fields)
        check_name(asked.model, self.settings)
        return asked

    async def _submit(self, asked: ChatRequest) -> None:
        """Queue the answers of a request."""
        sends = [self._sender(i) for i in range(asked.n)]
        self.answers = await self.loop.run_in_executor(self.readers, self.prompts.answers, asked, sends)
        self.num_reserved = 0
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
        self.events.put_nowait((0, ("error", ClientLeft())))

    async def _within_time(self, work):
        return await asyncio.wait_for(work, self.settings.timeout_s - (time.monotonic() - self.started))

    async def _events(self):
        """Yield (index of the answer, event) until all answers have ended; raise what went wrong."""
        left = len(self.answers)
        while left:
            index, event = await self._within_time(self.events.get())
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
        if self.leaver is not None:
            self.leaver.cancel()
        self.engine.release(self.num_reserved)
        self.num_reserved = 0
        self.engine.leave(self.answers)


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
    if isinstance(error, ConnectionAbortedError):
        return RequestError(f"The request was given up: {error}", 503)
    # Starlette raises its own where the client leaves in the middle of the body.
    if type(error).__name__ in ("ClientLeft", "ClientDisconnect") or not isinstance(error, Exception):
        return RequestError("The client left.", CLIENT_LEFT)
    return RequestError(f"The model failed ({type(error).__name__}); the log of the server says why.", 500)
