"""The unfinished block at the bottom of a terminal, drawn over itself where it changes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from rich.cells import get_character_cell_size
from rich.console import Console
from rich.style import Style
from rich.text import Text

# Joiners, emoji selectors and skin tones, and the columns that they add where they add most:
# terminals differ in how wide they make a character.
_UNSURE = {"\u200d": 0, "\ufe0f": 1, "\u20e3": 0} | dict.fromkeys(
    map(chr, range(0x1F3FB, 0x1F400)), 2
)

_Cells = list[tuple[str, Style]]


def widest(text: str) -> int:
    """Columns that a text takes on the terminal that takes most: one that joins no characters."""
    return sum(_UNSURE.get(letter, get_character_cell_size(letter)) for letter in text)


class LiveBlock:
    """Rows at the bottom of the screen that may still change; the cursor stays behind the last.

    Only what differs is written, in one piece: usually the new characters alone.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: list[_Cells] = []
        self._size = console.size

    @property
    def resized(self) -> bool:
        """Whether the screen's size changed since the block began: where its rows are is unsure."""
        return bool(self._rows) and self._console.size != self._size

    def show(self, rows: Sequence[Text], *, joined: bool = False) -> None:
        """Make the block consist of these rows.

        Args:
            rows: at least one, none wider than the screen.
            joined: the terminal itself breaks the rows that fill it, so that they are copied as
                one line.
        """
        if not self._rows:
            self._size = self._console.size
        before, self._rows = self._rows, [self._cells(row) for row in rows]
        if self._rows == before:
            return
        ends = ["" if joined and self._is_full(row) else "\n" for row in rows]
        # What scrolled off cannot be reached.
        place = max(_shared(self._rows, before), len(before) - self._console.height)
        place = min(place, len(rows) - 1)
        start, move = 0, ""
        if place == len(before):
            move = ends[place - 1] if place else ""
        else:
            start = _shared(self._rows[place], before[place])
            if place < len(before) - 1 or start < len(before[place]):
                start = _restart(rows[place].plain, start)
                column = widest(rows[place].plain[:start])
                move = _move(len(before) - 1 - place, column)
        ends[-1] = ""
        with self._console.capture() as drawn:
            for index in range(place, len(rows)):
                row = rows[index][start:] if index == place else rows[index]
                self._console.print(row, end=ends[index], soft_wrap=True)
        self._write(move + drawn.get())

    def commit(self) -> None:
        """Leave the block as it is; the cursor goes to the beginning of the line below it."""
        if self._rows:
            self._write("\n")
        self._rows = []

    def _cells(self, row: Text) -> _Cells:
        segments = row.render(self._console)
        return [(letter, style or Style.null()) for text, style, _ in segments for letter in text]

    def _is_full(self, row: Text) -> bool:
        return widest(row.plain) == self._console.width and _UNSURE.keys().isdisjoint(row.plain)

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


def _shared(a: Sequence[object], b: Sequence[object]) -> int:
    """How many items two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _restart(row: str, start: int) -> int:
    """Where to begin to write a row anew, at `start` or before it.

    Its last character is always written: it leaves the cursor behind it, in whatever way the
    terminal marks a full row. What a mark combines with is written together with it.
    """
    start = max(min(start, len(row) - 1), 0)
    if not _UNSURE.keys().isdisjoint(row[:start]):
        return 0
    while start and get_character_cell_size(row[start]) == 0:
        start -= 1
    return start


def _move(up: int, column: int) -> str:
    """Go to a column of a row above, and clear the screen from there."""
    return "\r" + (f"\x1b[{up}A" if up else "") + (f"\x1b[{column}C" if column else "") + "\x1b[J"
