"""A spinner until an answer begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.status import Status

    from teal_cli.progress import Reporter, Task


class Waiting:
    """A reporter that shows a spinner until it, or the answer, has something else to show."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._status: Status | None = None

    @contextmanager
    def shown(self, wanted: bool) -> Iterator[None]:
        """Show the spinner, if it is wanted, until `stop` or the block's end."""
        if wanted:
            from rich.console import Console
            from rich.status import Status

            self._status = Status("", console=Console(stderr=True, highlight=False))
            self._status.start()
        try:
            yield
        finally:
            self.stop()

    def stop(self) -> None:
        """Take the spinner away, without a trace."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def note(self, message: str) -> None:
        """Print one line in the spinner's place."""
        self.stop()
        self._reporter.note(message)

    @contextmanager
    def task(self, label: str, total: int | None = None, unit: str = "it") -> Iterator[Task]:
        """Follow a piece of work in the spinner's place."""
        self.stop()
        with self._reporter.task(label, total, unit) as task:
            yield task

    def expect(self, costs: Sequence[float | None]) -> None:
        """Count what comes next."""
        self._reporter.expect(costs)

    def skip(self) -> None:
        """Count a task that is done already."""
        self._reporter.skip()
