"""The engine: one thread and one session, which answer what waits, one request after another."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from teal_cli.errors import TealError
from teal_cli.faults import explain
from teal_cli.inference.generate import Finish, Token
from teal_cli.inference.sampling import Sampler
from teal_cli.inference.session import Session
from teal_cli.inference.text_stream import Text, generate_text
from teal_cli.serve.model import Model, Prepared
from teal_cli.serve.prefixes import Prefixes
from teal_cli.serve.refusal import Refusal, refusal_of
from teal_cli.serve.waiting import FairQueue, Full

Step = Token | Text | Finish

# What a request is assumed to take before any has ended.
_FIRST_GUESS_S = 10.0
_LONGEST_RETRY_S = 300


@dataclass(eq=False)
class Work:
    """A request on its way: handed in, waiting, being answered, or given up.

    `hand` is called by the engine's thread, with each step or with what ended it early; what is
    handed after `gone` is set is looked at by nobody.
    """

    prepared: Prepared
    who: str
    deadline_s: float  # of the monotonic clock
    hand: Callable[[Step | Refusal], None]
    gone: threading.Event = field(default_factory=threading.Event)

    def is_over(self) -> bool:
        """Whether nobody waits for it any more, or its time is up."""
        return self.gone.is_set() or time.monotonic() >= self.deadline_s


class Engine:
    """Answers requests. One that is given up ends between two tokens, or two layers of a prompt."""

    def __init__(
        self,
        model: Model,
        session: Session,
        *,
        most_waiting: int,
        prefix_bytes: int,
        note: Callable[[str], None],
    ) -> None:
        """Start the thread.

        Args:
            model: what is served.
            session: its, which belongs to the thread from now on, with what guesses for it.
            most_waiting: requests that may wait.
            prefix_bytes: memory for the keys of conversations beside the present one.
            note: is told what went wrong in here, from the thread.
        """
        self.model = model
        self._session, self._drafting = session, session.drafting
        self._prefixes = Prefixes(session, prefix_bytes)
        self._queue: FairQueue[Work] = FairQueue(most_waiting)
        self._note = note
        self._running = False
        self._ends_s = math.inf  # of the monotonic clock
        self._usual_s = _FIRST_GUESS_S  # a request takes, by those of late
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def running(self) -> bool:
        """Whether one is being answered."""
        return self._running

    @property
    def prefix_bytes(self) -> int:
        """Memory that conversations besides the present one take."""
        return self._prefixes.nbytes

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken and answered."""
        return self._thread.is_alive() and not self._queue.is_closed

    def submit(self, work: Work) -> None:
        """Let a request wait for its turn.

        Raises:
            Refusal: too many wait, or the server ends.
        """
        try:
            self._queue.put(work.who, work)
        except Full:
            if self._queue.is_closed:
                raise _ending() from None
            retry_s = min(round(self.waiting * self._usual_s) or 1, _LONGEST_RETRY_S)
            raise Refusal(
                f"{self.waiting} requests wait already, which is as many as may",
                status=429,
                code="rate_limit_exceeded",
                retry_after_s=retry_s,
            ) from None

    def give_up(self, work: Work) -> None:
        """Nobody waits for a request any more."""
        work.gone.set()
        self._queue.remove(work.who, work)

    def drain(self, seconds: float) -> None:
        """Take nothing more, refuse what waits, and give the present answer so long to end."""
        for work in self._queue.close():
            work.hand(_ending())
        self._ends_s = time.monotonic() + seconds

    def join(self, seconds: float) -> None:
        """Wait for the end of a drained engine."""
        self._thread.join(seconds)

    def _run(self) -> None:
        while (work := self._queue.take()) is not None:
            if work.gone.is_set():
                continue
            self._running = True
            began = time.monotonic()
            try:
                for step in self._answer(work):
                    work.hand(step)
            except Refusal as refusal:
                work.hand(refusal)
            except TealError as error:
                work.hand(refusal_of(error))
            except Exception as error:  # a fault of one request is not the next one's
                self._note(explain(error).message)
                work.hand(Refusal("the server failed at this; its log says how", status=500))
            self._usual_s += 0.2 * (time.monotonic() - began - self._usual_s)
            self._running = False

    def _answer(self, work: Work) -> Iterator[Step]:
        prepared = work.prepared
        if work.is_over():
            raise Refusal("the request waited as long as an answer may take", status=503)
        self._prefixes.prepare(prepared.tokens, prepared.setting)
        self._session.drafting = self._drafting if prepared.drafts else None
        sampler = Sampler(
            prepared.sampling,
            answer_from=len(prepared.tokens),
            top_logprobs=prepared.asked.logprobs,
        )
        said, answered = "", []
        for step in generate_text(
            self._session,
            self.model.tokenizer,
            prepared.tokens,
            sampler,
            prepared.limits,
            chat_prompt=prepared.text,
            interrupted=lambda: work.is_over() or time.monotonic() >= self._ends_s,
        ):
            if isinstance(step, Token):
                answered.append(step.id)
            elif isinstance(step, Text) and not step.thinking:
                said += step.text
            elif isinstance(step, Finish):
                if step.reason == "interrupted" and not answered:
                    raise _cut_short()
                self.model.remember(prepared, said, answered)
            yield step


def _ending() -> Refusal:
    return Refusal("the server is about to end", status=503, retry_after_s=5)


def _cut_short() -> Refusal:
    return Refusal("the time for the answer was up before its first token", status=503)
