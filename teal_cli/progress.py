"""How the core reports what it does: it calls a `Reporter`, and the command line draws it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of work in progress."""

    def advance(self, amount: int = 1) -> None:
        """Report that `amount` more units are done."""


class Reporter(Protocol):
    """What the core needs to tell its caller while it works."""

    def note(self, message: str) -> None:
        """One line: what is being done, how big it is, where it lands."""

    def task(
        self, label: str, total: int | None = None, unit: str = "it"
    ) -> AbstractContextManager[Task]:
        """A piece of work of `total` units; `unit` is "B" for bytes or a noun's short form."""

    def expect(self, costs: Sequence[float | None]) -> None:
        """The tasks that come next are steps of one road, with those that were before.

        Each has a cost in a unit that they share; None is not known. No costs end the road.
        """

    def skip(self) -> None:
        """A task that was expected turned out to be done already."""


class Road:
    """Counts the tasks that were expected, and says how long what is left of them takes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = clock()
        self._ahead: list[float | None] = []
        self._cost: float | None = None  # of the present step
        self._spent_s = self._paid = 0.0  # by the steps with a cost that are done
        self.steps = 0  # begun or skipped

    @property
    def total(self) -> int:
        """How many steps there are, as far as is known."""
        return self.steps + len(self._ahead)

    @property
    def seconds(self) -> float:
        """How long it has taken."""
        return self._clock() - self._began_s

    def expect(self, costs: Sequence[float | None]) -> None:
        """Replace what lies ahead."""
        self._ahead = list(costs)

    def begin(self) -> bool:
        """A task begins: whether it is a step of this road."""
        if not self._ahead:
            return False
        self._cost = self._ahead.pop(0)
        self.steps += 1
        return True

    def finish(self, seconds: float) -> None:
        """The present step is done, after so long."""
        if self._cost:
            self._spent_s += seconds
            self._paid += self._cost

    def left_s(self, rest_s: float, seconds: float) -> float | None:
        """Seconds until all steps are done; None while no rate is known for one of them.

        Args:
            rest_s: what the present step still needs, by its own rate.
            seconds: what it has taken.
        """
        ahead = [cost for cost in self._ahead if cost != 0]
        spent_s, paid = self._spent_s, self._paid
        if self._cost:
            spent_s, paid = spent_s + seconds + rest_s, paid + self._cost
        if not ahead:
            return rest_s
        if not paid or None in ahead:
            return None
        return rest_s + sum(filter(None, ahead)) * spent_s / paid


class _SilentTask:
    def advance(self, amount: int = 1) -> None:
        pass


class Silent:
    """A reporter that says nothing: for tests and for use as a library."""

    def note(self, message: str) -> None:
        pass

    @contextmanager
    def task(self, label: str, total: int | None = None, unit: str = "it") -> Iterator[Task]:
        yield _SilentTask()

    def expect(self, costs: Sequence[float | None]) -> None:
        pass

    def skip(self) -> None:
        pass


class LineTask:
    """Counts what is done, so that the closing line can say how much it was."""

    def __init__(self) -> None:
        self.done = 0

    def advance(self, amount: int = 1) -> None:
        self.done += amount
