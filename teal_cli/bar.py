"""The bar of a task on a terminal; `console` imports it when one is first shown."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.progress import Task as RichTask
from rich.text import Text

from teal_cli.amounts import format_amount, format_left, format_rate
from teal_cli.progress import LineTask, Road

_START_S = 0.2


class _Text(ProgressColumn):
    """What the task itself says."""

    def render(self, task: RichTask) -> Text:
        return Text(task.fields["text"](), no_wrap=True)


def new_progress() -> Progress:
    """A display on stderr: label, bar, and what the task's `text` says."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=10),
        _Text(),
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
        self._from: tuple[float, int] | None = None  # what the rate counts from
        self._last_s = self._began_s  # when the last report came
        self._id = progress.add_task(label, total=total, text=self.text)

    def advance(self, amount: int = 1) -> None:
        super().advance(amount)
        self._last_s = time.monotonic()
        if self._from is None:
            # A report at the very start is of what an earlier run has done.
            kept = self.done if self._last_s - self._began_s < _START_S else 0
            self._from = self._began_s, kept
        self._progress.advance(self._id, amount)

    def remove(self) -> None:
        self._progress.remove_task(self._id)

    def text(self) -> str:
        """How much is done, of how much, and what is left; how fast, where there is room."""
        text = format_amount(self.done, self._unit)
        if self._total is not None:
            text = f"{text.removesuffix(self._unit).rstrip()} of "
            text += format_amount(self._total, self._unit)
        per_s = self._per_s()
        if not per_s:
            return text
        if self._road is None or self._total is None:
            text += f", {format_rate(per_s, self._unit)}"
        return text if self._total is None else f"{text}, {self._left(self._total, per_s)}"

    def _left(self, total: int, per_s: float) -> str:
        # It runs down between two reports, for as long as one usually takes.
        waited_s = min(time.monotonic() - self._last_s, 1 / per_s)
        rest_s = max((total - self.done) / per_s - waited_s, 0)
        left_s = rest_s
        if self._road is not None:
            known = self._road.left_s(rest_s, time.monotonic() - self._began_s)
            if known is None:
                return f"{format_left(rest_s)} left in this step"
            left_s = known
        return f"about {format_left(left_s)} left"

    def _per_s(self) -> float:
        """The rate, once there is something to tell it from."""
        if self._from is None:
            return 0.0
        seconds, done = self._last_s - self._from[0], self.done - self._from[1]
        return done / seconds if done and seconds > _START_S else 0.0
