"""Answer HTTP requests in the form of OpenAI's chat API: routes, the key, and errors."""

import hmac
import time

from llava_lite.serve.api.body import Bodies
from llava_lite.serve.api.call import Call, Calls, Settings, check_name
from llava_lite.serve.api.engine import Engine
from llava_lite.serve.api.errors import RequestError, error_body
from llava_lite.serve.api.prompts import Prompts
from llava_lite.serve.api.readers import Readers

# Of a body that is incomplete, no more is read.
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}, 429: {"Retry-After": "1"}}


def build_app(engine: Engine, prompts: Prompts, settings: Settings):
    """Return the FastAPI application of an engine that has been started."""
    from fastapi import APIRouter, Depends, FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException

    app = FastAPI(title="llava_lite", docs_url=None, redoc_url=None, openapi_url=None)
    created = int(time.time())
    calls = Calls(engine, Bodies(prompts.limits, settings.timeout_s), Readers(prompts), settings)
    app.state.engine, app.state.calls = engine, calls

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
        return JSONResponse(error.body, error.status, HEADERS.get(error.status))

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
        response = await Call(calls).respond(request)
        if isinstance(response, dict):
            return JSONResponse(response)
        return StreamingResponse(response, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    app.include_router(guarded)
    return app
