"""How the core reports what it does: it calls a `Reporter`, and the command line draws it."""

from __future__ import annotations

from collections.abc import Iterator
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
