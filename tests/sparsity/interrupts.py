"""Reporters that end a calibration early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from reporters import Notes

from teal_cli.progress import Silent, Task

QUIET = Silent()


class Stop(Exception):
    """What ends a run early here."""


class StopsAfter(Notes):
    """Fails once so many layers are done, and keeps the notes."""

    def __init__(self, layers: int | None) -> None:
        super().__init__()
        self.left = layers

    @contextmanager
    def task(self, label: str, total: int | None = None, unit: str = "it") -> Iterator[Task]:
        yield self

    def advance(self, amount: int = 1) -> None:
        if self.left is not None and amount:
            self.left -= amount
            if self.left <= 0:
                raise Stop
