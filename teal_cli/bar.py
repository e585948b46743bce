"""The bar of a task on a terminal; `console` imports it when one is first shown."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.progress import Task as RichTask
from rich.text import Text

from teal_cli.console import LineTask, format_amount, format_left, format_rate
from teal_cli.progress import Road


class _Said(ProgressColumn):
    """What a function of the task says now."""

    def __init__(self, field: str) -> None:
        super().__init__()
        self._field = field

    def render(self, task: RichTask) -> Text:
        return Text(task.fields[self._field](), no_wrap=True)


def new_progress() -> Progress:
    """A display on stderr: label, bar, and what the task's `amount` and `left` say."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        _Said("amount"),
        _Said("left"),
        console=Console(stderr=True, highlight=False),
        transient=True,
    )


class BarTask(LineTask):
    """A bar; of a step of a road, with what is left of all."""

    def __init__(
        self, progress: Progress, label: str, total: int | None, unit: str, road: Road | None
    ) -> None:
        super().__init__()
        self._progress, self._total, self._unit, self._road = progress, total, unit, road
        self._began_s = time.monotonic()
        # The rate counts from the first report on: it may be of what an earlier run has done.
        self._first: tuple[float, int] | None = None
        self._id = progress.add_task(label, total=total, amount=self.amount, left=self.left)

    def advance(self, amount: int = 1) -> None:
        super().advance(amount)
        self._first = self._first or (time.monotonic(), self.done)
        self._progress.advance(self._id, amount)

    def remove(self) -> None:
        self._progress.remove_task(self._id)

    def amount(self) -> str:
        """How much is done, of how much, how fast."""
        text = format_amount(self.done, self._unit)
        if self._total is not None:
            text = f"{text.removesuffix(self._unit).rstrip()} of "
            text += format_amount(self._total, self._unit)
        rate = self._per_s()
        return f"{text}, {format_rate(rate, self._unit)}" if rate else text

    def left(self) -> str:
        """About how long it takes until all is done; empty while nothing is measured."""
        rate = self._per_s()
        if not rate or self._total is None:
            return ""
        rest_s = max(self._total - self.done, 0) / rate
        if self._road is None:
            return f"about {format_left(rest_s)} left"
        left_s = self._road.left_s(rest_s, time.monotonic() - self._began_s)
        if left_s is None:
            return f"about {format_left(rest_s)} left in this step"
        return f"about {format_left(left_s)} left"

    def _per_s(self) -> float:
        if self._first is None or self.done <= self._first[1]:
            return 0.0
        return (self.done - self._first[1]) / max(time.monotonic() - self._first[0], 1e-9)
