"""An answer on its way to a client: whole or streamed, and given up when the client goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from teal_cli.inference.generate import Finish
from teal_cli.serve.engine import Engine, Step, Work
from teal_cli.serve.model import Prepared
from teal_cli.serve.refusal import Refusal
from teal_cli.serve.shapes import Answer

# A client that takes nothing for so long is gone, whatever its connection says.
_SEND_S = 60.0
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class AnswerResponse(Response):
    """Answers one request, and leaves its `Answer` in the scope's state.

    The status waits for the first step, so that a refusal by the engine has its own.
    """

    def __init__(self, engine: Engine, prepared: Prepared, who: str, deadline_s: float) -> None:
        """Hand the request in; its time runs from now.

        Raises:
            Refusal: the engine takes no more.
        """
        self.answer = Answer(engine.model, prepared)
        self._engine = engine
        self._steps: asyncio.Queue[Step | Refusal | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def hand(step: Step | Refusal) -> None:
            if not work.gone.is_set():
                loop.call_soon_threadsafe(self._steps.put_nowait, step)

        self._work = work = Work(prepared, who, deadline_s, hand)
        engine.submit(work)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, or until the client goes."""
        watch = asyncio.create_task(self._until_gone(receive))
        try:
            first = await self._steps.get()
            if first is None:
                return
            if isinstance(first, Refusal):
                await error_response(first)(scope, receive, send)
            elif self._work.prepared.asked.stream:
                await self._stream(first, send)
            else:
                await self._whole(first, scope, receive, send)
        except (asyncio.TimeoutError, OSError):  # the client takes nothing
            pass
        finally:
            self._engine.give_up(self._work)
            watch.cancel()
            scope["state"]["answer"] = self.answer

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._engine.give_up(self._work)
        self._steps.put_nowait(None)

    async def _following(self, first: Step) -> AsyncIterator[Step | Refusal | None]:
        """The steps from the first on, to the last, a refusal, or None where the client goes."""
        step: Step | Refusal | None = first
        while True:
            yield step
            if step is None or isinstance(step, (Finish, Refusal)):
                return
            step = await self._steps.get()

    async def _whole(self, first: Step, scope: Scope, receive: Receive, send: Send) -> None:
        async for step in self._following(first):
            if step is None:
                return
            if isinstance(step, Refusal):
                await error_response(step)(scope, receive, send)
                return
            self.answer.add(step)
        await JSONResponse(self.answer.whole())(scope, receive, send)

    async def _stream(self, first: Step, send: Send) -> None:
        headers = {"Content-Type": "text/event-stream; charset=utf-8", **_STREAM_HEADERS}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        events = self.answer.opening()
        async for step in self._following(first):
            if step is None:
                return
            # A refusal this late is an event: the status has gone out.
            events += [step.document()] if isinstance(step, Refusal) else self.answer.add(step)
            if events:
                await self._send(send, "".join(map(_event, events)))
            events = []
        await self._send(send, "data: [DONE]\n\n", more=False)

    @staticmethod
    async def _send(send: Send, text: str, *, more: bool = True) -> None:
        message = {"type": "http.response.body", "body": text.encode(), "more_body": more}
        await asyncio.wait_for(send(message), _SEND_S)


def error_response(refusal: Refusal) -> Response:
    """OpenAI's error object as a response."""
    return JSONResponse(refusal.document(), refusal.status, refusal.headers)


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"
