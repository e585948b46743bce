"""Markdown on a terminal, shown as it comes: what was printed is never printed again.

A line of source is shown when it is complete, a long one as soon as it fills a line of the screen;
a table when it ends, because its widths depend on all of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich import box
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from teal_cli.printable import printable

_FENCE = re.compile(r"\s*(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$")
_HEADING = re.compile(r"\s{0,3}#{1,6}\s+(.*?)[\s#]*$")
_RULE = re.compile(r"\s{0,3}([-*_])(\s*\1){2,}\s*$")
_ITEM = re.compile(r"(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$")
_QUOTE = re.compile(r"\s{0,3}>\s?(.*)$")
_ROW = re.compile(r"\s*\|")
_OPEN = re.compile(r"[*_`~\[<]")
_DELIMITER = re.compile(r"\s*:?-+:?\s*$")

# Lines of code that decide a line's colours, itself the last: they are coloured anew for each.
_COLOUR_CONTEXT = 40
_RULE_WIDTH = 40

_STYLES = {"strong": "bold", "em": "italic", "s": "strike", "link": "underline"}


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of source: what stands before its first row and before the others, and its text."""

    first: Text
    others: Text
    text: Text


@dataclass(slots=True)
class _Code:
    """A block of code that is open: what closes it, and what it holds so far."""

    fence: str
    language: str
    lines: list[str] = field(default_factory=list)


class MarkdownWriter:
    """Writes an answer, piece by piece, to a rich console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pending = ""  # the line of source that is not complete
        self._shown: list[str] = []  # rows of it that are on the screen
        self._laid_out = 0  # how much of it was there when its rows were last looked at
        self._table: list[str] = []
        self._code: _Code | None = None

    def write(self, text: str) -> None:
        """Take the next piece, and show what it completes."""
        *lines, self._pending = (self._pending + text).split("\n")
        for line in lines:
            self._complete(line)
            self._laid_out = 0
        self._show_full_rows()

    def close(self) -> None:
        """Show the rest."""
        if self._pending:
            self._complete(self._pending)
        self._pending = ""
        self._end_table()

    def _complete(self, line: str) -> None:
        if self._code is not None:
            self._complete_code(self._code, line)
            return
        if _ROW.match(line):
            self._table.append(line)
            return
        self._end_table()
        if (fence := _FENCE.match(line)) and not self._shown:
            self._code = _Code(fence[1], fence[2])
            self._print(Text(line.strip(), style="dim"))
        else:
            self._print_rows(self._rows(_parse(line, self._console.width)))
        self._shown = []

    def _complete_code(self, code: _Code, line: str) -> None:
        mark = line.strip()
        if mark.startswith(code.fence) and not mark.strip(code.fence[0]):
            self._code = None
            self._print(Text(mark, style="dim"))
            return
        code.lines.append(line)
        self._print(_coloured(code))

    def _show_full_rows(self) -> None:
        """Show the rows of the pending line that nothing to come can change."""
        length, width = len(self._pending), self._console.width
        if self._code is not None or self._table or length <= width:
            return
        if length < self._laid_out + width // 2:
            return
        self._laid_out = length
        words = self._pending[: self._pending.rfind(" ") + 1].rstrip()
        if _ROW.match(words) or _FENCE.match(words):
            return
        line = _parse(words, width)
        # A mark that found no partner yet is left in the text, and may find one later.
        if not _OPEN.search(line.text.plain):
            self._print_rows(self._rows(line)[:-1])

    def _rows(self, line: _Line) -> list[Text]:
        """The rows of the screen that a line of source takes."""
        width = max(self._console.width - line.others.cell_len, 1)
        rows = line.text.wrap(self._console, width)
        return [
            Text.assemble(line.others if index else line.first, row)
            for index, row in enumerate(rows or [Text()])
        ]

    def _print_rows(self, rows: list[Text]) -> None:
        """Print those rows that are not on the screen yet."""
        plain = [row.plain for row in rows]
        same = 0
        while same < min(len(plain), len(self._shown)) and plain[same] == self._shown[same]:
            same += 1
        for row in rows[same:]:
            row.rstrip()
            self._print(row)
        self._shown = plain

    def _print(self, text: Text) -> None:
        # A row fits already, and a longer line of code is the terminal's to wrap: so it can be
        # copied whole.
        self._console.print(text, soft_wrap=True)

    def _end_table(self) -> None:
        lines, self._table = self._table, []
        if not lines:
            return
        rows = [_cells(line) for line in lines]
        if len(rows) < 2 or not all(map(_DELIMITER.match, rows[1])):
            for line in lines:
                self._print(inline(line))
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for header, mark in zip(rows[0], rows[1] + ["-"] * len(rows[0]), strict=False):
            left, right = mark.startswith(":"), mark.endswith(":")
            table.add_column(
                inline(header),
                justify="center" if left and right else "right" if right else "left",
                overflow="fold",
            )
        for row in rows[2:]:
            table.add_row(*(inline(cell) for cell in row[: len(rows[0])]))
        self._console.print(table)


def inline(source: str) -> Text:
    """A piece of Markdown without blocks, as styled text that a terminal does not obey.

    Entities and percent signs can spell control characters, so that the text is cleaned last.
    """
    text = Text()
    styles: list[str] = []
    target = ""
    start = 0
    for token in _parser().parseInline(source)[0].children or []:
        kind, _, end = token.type.rpartition("_")
        if kind in _STYLES and end == "open":
            styles.append(_STYLES[kind])
            if kind == "link":
                target, start = str(token.attrs["href"]), len(text)
        elif kind in _STYLES:
            styles.remove(_STYLES[kind])
            if kind == "link" and target.removeprefix("mailto:") != text.plain[start:]:
                text.append(f" ({printable(target)})", style="dim")
        else:
            text.append(_content(token), style=" ".join(styles + _code_style(token)))
    return text


def _content(token: Token) -> str:
    if token.type == "image":
        return f"[{printable(token.content)}] ({printable(str(token.attrs['src']))})"
    return printable(token.content)


def _code_style(token: Token) -> list[str]:
    return ["cyan"] if token.type == "code_inline" else []


def _parse(line: str, width: int) -> _Line:
    """Tell what kind of line this is."""
    empty = Text()
    if heading := _HEADING.match(line):
        text = inline(heading[1])
        text.stylize("bold")
        return _Line(empty, empty, text)
    if _RULE.match(line):
        return _Line(empty, empty, Text("─" * min(_RULE_WIDTH, width), style="dim"))
    if item := _ITEM.match(line):
        indent, mark, content = item.groups()
        first = Text(f"{indent}{'•' if mark in '-*+' else mark} ")
        return _Line(first, Text(" " * first.cell_len), inline(content))
    if quote := _QUOTE.match(line):
        bar = Text("│ ", style="dim")
        return _Line(bar, bar, inline(quote[1]))
    content = line.lstrip()
    indent_text = Text(" " * (len(line) - len(content)))
    return _Line(indent_text, indent_text, inline(content))


def _cells(line: str) -> list[str]:
    inner = line.strip().removeprefix("|").removesuffix("|")
    return [cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", inner)]


def _coloured(code: _Code) -> Text:
    """The last line of a block of code, coloured in the light of those before it."""
    if not code.language:
        return Text(code.lines[-1])
    lines = code.lines[-_COLOUR_CONTEXT:]
    source = "\n".join(lines)
    coloured = Syntax("", code.language, theme="ansi_dark").highlight(source).split("\n")
    return coloured[len(lines) - 1] if len(coloured) >= len(lines) else Text(lines[-1])


@cache
def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable("strikethrough")
