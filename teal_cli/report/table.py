"""Tables of text, whoever shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Table:
    """Cells below their columns' names, which say the units."""

    columns: list[str]
    rows: list[list[str]]
    title: tuple[str, ...] = ()  # lines
    figures: bool = False  # Markdown puts all but the first column to the right

    @classmethod
    def of(
        cls,
        rows: Iterable[Row],
        columns: Sequence[tuple[str, Callable[[Row], str]]],
        *,
        title: Sequence[str] = (),
        figures: bool = False,
    ) -> Table:
        """Typed rows, by columns that each know their name and the text of a row's cell."""
        cells = [[text(row) for _, text in columns] for row in rows]
        return cls([name for name, _ in columns], cells, tuple(title), figures)

    def markdown(self) -> str:
        """As a pipe table, without the title."""
        rule = ["---", *["---:" if self.figures else "---"] * (len(self.columns) - 1)]
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.columns, rule, *self.rows))
