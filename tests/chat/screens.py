"""A terminal that can be looked at: what rich writes, on pyte's screen."""

from __future__ import annotations

import io
import re
from typing import Any

import pyte
from rich.console import Console

_UP = re.compile(r"\x1b\[(\d+)A")


class Screen(io.StringIO):
    """A terminal of a size, with what scrolled off its top."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self._screen = pyte.HistoryScreen(width, height, history=100_000, ratio=0.001)
        self._screen.set_mode(
            pyte.modes.LNM
        )  # a terminal's driver makes a line feed go to column 0
        self._stream = pyte.Stream(self._screen)
        self._console: Console | None = None
        self.log = ""

    def console(self) -> Console:
        """A rich console on it, in colour."""
        columns, lines = self._screen.columns, self._screen.lines
        self._console = Console(
            file=self, width=columns, height=lines, force_terminal=True, color_system="standard"
        )
        return self._console

    def write(self, text: str) -> int:
        self.log += text
        self._stream.feed(text)
        return len(text)

    def resize(self, width: int) -> None:
        """Change the width, as a user who pulls at the window does."""
        self._screen.resize(columns=width)
        if self._console is not None:
            self._console.size = (width, self._screen.lines)  # type: ignore[assignment]

    @property
    def moves_up(self) -> list[int]:
        """By how many rows the cursor was moved up, each time."""
        return [int(rows) for rows in _UP.findall(self.log)]

    def cells(self) -> list[list[Any]]:
        """Every row down to the cursor's, what scrolled off first, as pyte's characters."""
        rows = [*self._screen.history.top]
        rows += [self._screen.buffer[row] for row in range(self._screen.cursor.y + 1)]
        return [[row[column] for column in range(self._screen.columns)] for row in rows]

    def text(self) -> str:
        """The same as text, without what is blank at the ends."""
        rows = ("".join(cell.data for cell in row).rstrip() for row in self.cells())
        return "\n".join(rows).rstrip()
