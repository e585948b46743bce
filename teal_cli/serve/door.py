"""What every request passes: who may come in, and the line and the count that it leaves."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from teal_cli.faults import explain
from teal_cli.inference.generate import Stats
from teal_cli.serve.answering import error_response
from teal_cli.serve.listening import is_local
from teal_cli.serve.refusal import Refusal
from teal_cli.serve.shapes import Answer

_OPEN = "/health"  # to probes that have no key


class Door:
    """Lets in who may, and turns whatever fails inside into an error object.

    Without a key, only this machine's own programs are to be answered. A web page that is open in
    a browser here is none of them: it names its origin, or reaches us under a name of its own.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, origins: Collection[str]) -> None:
        """Guard an application.

        Args:
            app: what is behind the door.
            api_key: what everyone must know; None lets this machine's programs in.
            origins: of web pages that may ask; "*" is all.
        """
        self._app = app
        self._key = None if api_key is None else _digest(api_key.encode())
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, or refuse it."""
        headers = Headers(scope=scope)
        try:
            self._check(scope["path"], headers)
        except Refusal as refusal:
            await error_response(refusal)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is not None and not self._may(origin, headers):
            raise Refusal(
                "web pages of this origin may not ask here: start teal serve with --cors",
                status=403,
                code="origin_not_allowed",
            )
        if self._key is None:
            host = headers.get("host")
            if host is not None and not is_local(_name(host)):
                raise Refusal(
                    "without a key, only requests to localhost are answered",
                    status=403,
                    code="host_not_allowed",
                )
        elif path != _OPEN:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            given = _digest(key.strip().encode("latin-1", "replace"))
            if not hmac.compare_digest(given, self._key) or scheme.lower() != "bearer":
                raise Refusal(
                    "the API key is missing or wrong: send Authorization: Bearer KEY",
                    status=401,
                    code="invalid_api_key",
                )

    def _may(self, origin: str, headers: Headers) -> bool:
        if "*" in self._origins or origin in self._origins:
            return True
        return self._key is not None and urlsplit(origin).netloc == headers.get("host")


class Log:
    """Tells of each request when it has ended, and holds what fails behind it."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        paths: Mapping[Callable[..., Any], str],
        tell: Callable[[str], None],
        count: Callable[[str, int, Stats | None], None],
    ) -> None:
        """Follow an application.

        Args:
            app: what is followed; it leaves its endpoint in the scope, its answer in the state.
            paths: what endpoints are called. A client's own path could hold anything.
            tell: is given a line for each request; never a word of it.
            count: is given its route, its status and what its answer cost.
        """
        self._app, self._paths, self._tell, self._count = app, paths, tell, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request and tell of it."""
        began, status = time.monotonic(), 0
        notes = scope.setdefault("state", {})

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception as error:
            self._tell(explain(error).message)
            if status:
                raise
            refusal = Refusal("the server failed at this; its log says how", status=500)
            await error_response(refusal)(scope, receive, sending)
        finally:
            route = self._paths.get(scope.get("endpoint", None), "(other)")
            answer: Answer | None = notes.get("answer")
            stats = answer.finish.stats if answer is not None and answer.finish else None
            self._count(route, status, stats)
            client = scope["client"][0] if scope.get("client") else "-"
            words = [time.strftime("%Y-%m-%dT%H:%M:%S%z"), client, scope["method"][:16], route]
            words.append(str(status or "-"))
            if stats is not None:
                words.append(f"prompt {stats.prompt_tokens} ({stats.reused_tokens} cached)")
                words.append(f"new {stats.new_tokens}")
            elif answer is not None and status in (0, 200):
                words.append("client gone")
            self._tell(f"{' '.join(words)} {time.monotonic() - began:.3f} s")


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _digest(key: bytes) -> bytes:
    """So that a comparison tells nothing of the key's length."""
    return hashlib.sha256(key).digest()
