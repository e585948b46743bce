"""Markdown on a terminal, shown as it comes.

A block is a line of source, or the lines of a table. The unfinished one is drawn over itself with
every piece; what is above it, and what scrolled off, stays as it is.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field, replace

from rich import box
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from teal_cli.chat.inline import inline
from teal_cli.chat.live import LiveBlock, widest

_FENCE = re.compile(r"\s*(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$")
_HEADING = re.compile(r"\s{0,3}#{1,6}\s+(.*?)[\s#]*$")
_RULE = re.compile(r"\s{0,3}([-*_])(\s*\1){2,}\s*$")
_ITEM = re.compile(r"(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$")
_QUOTE = re.compile(r"\s{0,3}>\s?(.*)$")
_ROW = re.compile(r"\s*\|")
_DELIMITER = re.compile(r"\s*:?-+:?\s*$")

# Lines of code before a line that decide its colours: they are coloured anew for each piece of it.
_COLOUR_CONTEXT = 12
_TAB = 8  # columns, as terminals have it
_GAP = 3  # columns between those of a table
_RULE_WIDTH = 40


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of source: what stands before its first row and before the others, and the rest."""

    first: Text
    others: Text
    source: str
    style: str = ""


@dataclass(slots=True)
class _Code:
    """A block of code that is open: what closes it, and what it holds so far."""

    fence: str
    language: str
    lines: list[str] = field(default_factory=list)

    def is_closed_by(self, line: str) -> bool:
        mark = line.strip()
        return mark.startswith(self.fence) and not mark.strip(self.fence[0])


@dataclass(slots=True)
class _Table:
    """Lines that may be a table, the last perhaps unfinished."""

    lines: list[str] = field(default_factory=list)
    widths: list[int] | None = None  # of the columns, once rows are on the screen for good
    kept: int = 0  # lines that are


class MarkdownWriter:
    """Writes an answer, piece by piece, to a rich console on a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = LiveBlock(console)
        self._pending = ""  # the line of source that is not complete
        self._final = 0  # how much of it is on the screen for good
        self._part: _Line | None = None  # what kind of line that was
        self._table: _Table | None = None
        self._code: _Code | None = None
        self._dim = False

    def write(self, text: str, *, dim: bool = False) -> None:
        """Take the next piece, and show it; what is dim stands in lines of its own."""
        if dim != self._dim:
            self.close()
            self._dim = dim
        if self._live.resized:
            self._begin_anew()
        *lines, self._pending = (self._pending + text).expandtabs(_TAB).split("\n")
        for line in lines:
            self._show(line)
            self._complete(line)
        if self._pending.strip():
            self._show(self._pending)

    def close(self) -> None:
        """End the line, and whatever is open."""
        if self._pending:
            self._complete(self._pending)
        self._live.commit()
        self._pending, self._final = "", 0
        self._part = self._table = self._code = None

    def _complete(self, line: str) -> None:
        """Take a line that is shown as one to which nothing is added."""
        if self._table is not None:
            self._table.lines.append(line)
            return
        if self._code is not None:
            self._code.lines.append(line)
            if self._code.is_closed_by(line):
                self._code = None
        elif self._part is None and (fence := _FENCE.match(line)):
            self._code = _Code(fence[1], fence[2])
        self._final, self._part = 0, None
        self._live.commit()

    def _show(self, line: str) -> None:
        """Draw the block that ends with this line."""
        if self._code is not None:
            self._show_code(self._code, line)
        elif self._part is None and _ROW.match(line):
            self._table = self._table or _Table()
            self._show_table(self._table, line)
        else:
            if self._table is not None:
                self._table = None
                self._live.commit()
            self._show_line(line)

    def _show_line(self, line: str) -> None:
        parsed = self._parsed(line)
        rows = self._rows(parsed)
        if len(rows) > self._console.height:
            end = self._scroll(parsed, len(rows) - self._console.height // 2)
            self._final += line[self._final :].find(parsed.source) + end
            self._part = parsed
            rows = self._rows(self._parsed(line))
        self._live.show(rows)

    def _parsed(self, line: str) -> _Line:
        """What of a line can still change."""
        if self._part is None:
            return _parse(line, self._console.width)
        return replace(self._part, first=self._part.others, source=line[self._final :])

    def _scroll(self, line: _Line, count: int) -> int:
        """Leave the first `count` rows of a line as they are; return how much of its source."""

        def rows(end: int) -> int:
            return len(self._rows(replace(line, source=line.source[:end])))

        end = bisect_right(range(len(line.source)), count, key=rows) - 1
        word = line.source.rfind(" ", 0, end) + 1
        if word and rows(word) == rows(end):
            end = word
        self._live.show(self._rows(replace(line, source=line.source[:end])))
        self._live.commit()
        return end

    def _show_code(self, code: _Code, line: str) -> None:
        if code.is_closed_by(line):
            text = Text(line.strip(), style="dim")
        else:
            text = _coloured(code, line)[self._final :]
        self._live.show(_folded(self._styled(text), self._console.width), joined=True)

    def _show_table(self, table: _Table, line: str) -> None:
        lines = [*table.lines, line]
        rows = self._table_rows(table, lines)
        if len(rows) > self._console.height and table.lines[table.kept :]:
            self._keep_rows(table)
            rows = self._table_rows(table, lines)
        self._live.show(rows)

    def _keep_rows(self, table: _Table) -> None:
        """Leave a table's complete rows as they are; its columns keep their widths."""
        self._live.show(self._table_rows(table, table.lines))
        self._live.commit()
        table.widths = _widths(table.lines, self._console.width)
        table.kept = len(table.lines)

    def _begin_anew(self) -> None:
        """Leave what is on the screen as it is, and go on below it at the screen's new width."""
        self._live.commit()
        if self._table is not None:
            self._table.widths = _widths(self._table.lines, self._console.width)
            self._table.kept = len(self._table.lines)
            return
        if self._code is None:
            self._part = self._parsed(self._pending)
        self._final = len(self._pending)

    def _rows(self, line: _Line) -> list[Text]:
        """The rows of the screen that a line of source takes."""
        text, width = inline(line.source), self._console.width
        text.stylize(line.style)
        first, others = line.first, line.others
        if others.cell_len > width // 2:  # too narrow for so deep an indentation
            text, first, others = Text.assemble(first, text), Text(), Text()
        rows = []
        for index, words in enumerate(_wrapped(text, self._console, width - others.cell_len)):
            row = Text.assemble(others if index else first, words)
            row.rstrip()
            rows += _folded(self._styled(row), width)
        return rows

    def _table_rows(self, table: _Table, lines: list[str]) -> list[Text]:
        widths = table.widths or _widths(lines, self._console.width)
        if widths is None:
            return [row for line in lines[table.kept :] for row in self._rows(_plain(line))]
        cells = [_cells(line) for line in lines]
        drawn = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=not table.kept
        )
        marks = cells[1] + ["-"] * len(cells[0])
        for header, mark, width in zip(cells[0], marks, widths, strict=False):
            left, right = mark.startswith(":"), mark.endswith(":")
            drawn.add_column(
                inline(header),
                justify="center" if left and right else "right" if right else "left",
                overflow="fold",
                width=width,
            )
        for line_cells in cells[max(table.kept, 2) :]:
            drawn.add_row(*(inline(cell) for cell in line_cells[: len(cells[0])]))
        rows = []
        for segments in self._console.render_lines(drawn, pad=False):
            row = Text.assemble(*((text, style or "") for text, style, _ in segments))
            row.rstrip()
            rows.append(self._styled(row))
        return rows

    def _styled(self, text: Text) -> Text:
        if self._dim:
            text.stylize("dim")
        return text


def _parse(line: str, width: int) -> _Line:
    """Tell what kind of line this is."""
    empty = Text()
    if heading := _HEADING.match(line):
        return _Line(empty, empty, heading[1], "bold")
    if _RULE.match(line):
        return _Line(Text("─" * min(_RULE_WIDTH, width), style="dim"), empty, "")
    if item := _ITEM.match(line):
        indent, mark, content = item.groups()
        first = Text(f"{indent}{'•' if mark in '-*+' else mark} ")
        return _Line(first, Text(" " * first.cell_len), content)
    if quote := _QUOTE.match(line):
        bar = Text("│ ", style="dim")
        return _Line(bar, bar, quote[1])
    if _FENCE.match(line):
        return _Line(Text(line.strip(), style="dim"), empty, "")
    return _plain(line)


def _plain(line: str) -> _Line:
    content = line.lstrip()
    indent = Text(" " * (len(line) - len(content)))
    return _Line(indent, indent, content)


def _wrapped(text: Text, console: Console, width: int) -> list[Text]:
    """Rows of whole words that fit, however wide the terminal takes their characters to be."""
    for room in range(width, 0, -1):
        rows = list(text.wrap(console, room))
        if all(widest(row.plain) <= width for row in rows):
            break
    return rows or [Text()]


def _folded(text: Text, width: int) -> list[Text]:
    """Rows as a terminal breaks a line that is too long, in the middle of words."""
    starts, column = [0], 0
    for index, character in enumerate(text.plain):
        column += widest(character)
        if column > width:
            starts.append(index)
            column = widest(character)
    return list(text.divide(starts[1:]))


def _cells(line: str) -> list[str]:
    inner = line.strip().removeprefix("|").removesuffix("|")
    return [cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", inner)]


def _widths(lines: list[str], room: int) -> list[int] | None:
    """The columns' widths, made to fit; None where the lines are no table, or one too wide."""
    cells = [_cells(line) for line in lines]
    if len(cells) < 2 or not all(map(_DELIMITER.match, cells[1])):
        return None
    count = len(cells[0])
    room -= _GAP * (count - 1)
    if room < count:
        return None
    widths = [1] * count
    for row in cells[:1] + cells[2:]:
        for place, cell in enumerate(row[:count]):
            widths[place] = max(widths[place], widest(inline(cell).plain))
    while sum(widths) > room:
        widths[widths.index(max(widths))] -= 1
    return widths


def _coloured(code: _Code, line: str) -> Text:
    """The last line of a block of code, coloured in the light of those before it."""
    if not code.language:
        return Text(line)
    lines = [*code.lines[-_COLOUR_CONTEXT:], line]
    coloured = Syntax("", code.language, theme="ansi_dark").highlight("\n".join(lines)).split("\n")
    return coloured[len(lines) - 1] if len(coloured) >= len(lines) else Text(line)
