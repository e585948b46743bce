"""uvicorn on an engine: refusals as error objects, and an end that lets answers finish."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from teal_cli.serve.engine import Engine
from teal_cli.serve.refusal import Refusal

# Between a connection, or an answer on it, and the whole head of the next request.
_HEAD_S = 30.0
_MOST_CONNECTIONS = 1000
# After the last answer's limit, for clients to take what is left of theirs.
_LAST_SENDING_S = 5


def server(app: ASGIApp, engine: Engine, *, drain_s: float) -> uvicorn.Server:
    """What runs an application.

    Args:
        app: the application.
        engine: what answers behind it; it is drained when the server is to end.
        drain_s: how long the present answer may still take then, before it is cut.
    """
    # It has nothing to say that the log has not; of what fails, the log tells.
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL + 1)
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=round(drain_s) + _LAST_SENDING_S,
    )
    return _Server(config, engine, drain_s)


def run(server: uvicorn.Server, sock: socket.socket) -> None:
    """Serve at a socket that listens, until SIGTERM or Ctrl-C.

    Raises:
        KeyboardInterrupt: it was Ctrl-C.
    """
    # uvicorn takes SIGTERM as the wish for an end, and then raises it for the handler before.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        server.run([sock])
    finally:
        signal.signal(signal.SIGTERM, before)


class _Server(uvicorn.Server):
    """Drains the engine when it is to end."""

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_s: float) -> None:
        super().__init__(config)
        self._engine, self._drain_s = engine, drain_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.drain(self._drain_s)
        await super().shutdown(sockets)
        self._engine.drain(0.0)
        self._engine.join(_LAST_SENDING_S)


class _Protocol(H11Protocol):
    """HTTP whose own refusals are error objects, and which waits for no head for ever."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._wait_for_head()
        super().on_response_complete()
        if not self.cycle.response_complete:  # the next request had come already
            self._stop_waiting()

    def send_400_response(self, msg: str) -> None:
        refusal = Refusal("this is no HTTP request that can be read", code="invalid_http")
        body = json.dumps(refusal.document()).encode()
        head = (
            f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _wait_for_head(self) -> None:
        self._stop_waiting()
        self._waiting = self.loop.call_later(_HEAD_S, self._give_up)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        self.transport.abort()
