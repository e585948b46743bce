"""The routes of OpenAI's API, over an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from teal_cli.serve.answering import AnswerResponse, error_response
from teal_cli.serve.door import Door, Log
from teal_cli.serve.engine import Engine
from teal_cli.serve.metrics import Metrics
from teal_cli.serve.refusal import Refusal
from teal_cli.serve.request import Asked, chat_request, completion_request, read_object

MOST_BODY_BYTES = 4_000_000
_BODY_S = 30.0
_GONE = 499  # nginx's number for a client that left
_TEXT = "The API is at /v1: /v1/models, /v1/chat/completions, /v1/completions."


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server lets in, and how long it works on it."""

    answer_s: float  # from a request's arrival to the end of its answer
    body_bytes: int = MOST_BODY_BYTES
    body_s: float = _BODY_S


def build(
    engine: Engine,
    limits: Limits,
    *,
    api_key: str | None,
    origins: Collection[str],
    tell: Callable[[str], None],
) -> Starlette:
    """The application.

    Args:
        engine: what answers.
        limits: what is let in.
        api_key: what everyone must send; None lets this machine's programs in.
        origins: of web pages that may ask; "*" is all.
        tell: is given a line for each request, and for what fails.
    """
    metrics = Metrics(engine)

    def health(request: Request) -> Response:
        if not engine.is_alive:
            raise Refusal("the server is about to end", status=503)
        return JSONResponse({"status": "ok", "model": engine.model.name})

    def page(request: Request) -> Response:
        return Response(metrics.page(), headers={"Content-Type": metrics.content_type})

    def models(request: Request) -> Response:
        listed = [engine.model.described(name) for name in engine.model.ids]
        return JSONResponse({"object": "list", "data": listed})

    def model(request: Request) -> Response:
        return JSONResponse(engine.model.described(request.path_params["name"]))

    def answering(read: Callable[[Mapping[str, Any]], Asked]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            deadline_s = time.monotonic() + limits.answer_s
            asked = read(read_object(await _body(request, limits)))
            prepared = await asyncio.to_thread(engine.model.prepare, asked)
            who = asked.user or (request.client.host if request.client else "")
            return AnswerResponse(engine, prepared, who, deadline_s)

        return answer

    routes = [
        Route("/health", health),
        Route("/metrics", page),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/chat/completions", answering(chat_request), methods=["POST"]),
        Route("/v1/completions", answering(completion_request), methods=["POST"]),
    ]
    paths = {route.endpoint: route.path for route in routes}
    middleware = [
        Middleware(Log, paths=paths, tell=tell, count=metrics.count),
        *([Middleware(CORSMiddleware, **_cors(origins))] if origins else []),
        Middleware(Door, api_key=api_key, origins=origins),
    ]
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={
            Refusal: _refused,
            HTTPException: _not_found,
            ClientDisconnect: _gone,
        },
    )
    app.router.redirect_slashes = False
    return app


async def _body(request: Request, limits: Limits) -> bytes:
    """The body, which must come soon and stay small.

    Raises:
        Refusal: it does not.
        ClientDisconnect: the client goes before its end.
    """
    too_large = Refusal(
        f"the body is larger than {limits.body_bytes} bytes", status=413, code="body_too_large"
    )
    if int(request.headers.get("content-length", "0")) > limits.body_bytes:
        raise too_large

    async def read() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limits.body_bytes:
                raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), limits.body_s)
    except asyncio.TimeoutError:
        raise Refusal(f"the body did not come within {limits.body_s:g} s", status=408) from None


def _refused(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    return error_response(refusal)


def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=_GONE)  # to the log alone


def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        message = f"{request.method[:16]} is not what this path takes"
    else:
        message = f"there is nothing at this path. {_TEXT}"
    response = error_response(Refusal(message, status=error.status_code))
    response.headers.update(error.headers or {})
    return response


def _cors(origins: Collection[str]) -> dict[str, Any]:
    return {
        "allow_origins": list(origins),
        "allow_methods": ["GET", "POST"],
        "allow_headers": ["*"],
    }
