"""What the user sees: results on stdout; progress, notes and errors on stderr.

Only this module draws. `rich` is imported when a progress bar is first shown. What others wrote
(names, paths, errors of templates and servers) is made printable here, once for all messages.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from teal_cli.amounts import format_amount, format_rate, format_seconds
from teal_cli.faults import explain
from teal_cli.printable import escaped, printable
from teal_cli.progress import LineTask, Road

if TYPE_CHECKING:
    from rich.progress import Progress

    from teal_cli.bar import BarTask
    from teal_cli.progress import Task

BOLD, _DIM, _RED = "1", "2", "31"

_WORD = re.compile(r"\s*(?:`[^`]*`|\S)+")  # with the space before it; a command in `…` is one word
_LABEL = re.compile(r"\S+ {2,}")  # of a line that is a row of two columns


@dataclasses.dataclass(slots=True)
class _Settings:
    quiet: bool = False
    verbose: bool = False


_settings = _Settings()  # one process has one terminal


def configure(*, quiet: bool = False, verbose: bool = False) -> None:
    """Set how much is shown; flags given in several places add up."""
    _settings.quiet |= quiet
    _settings.verbose |= verbose


def is_verbose() -> bool:
    """Whether the libraries' warnings and log lines are shown too."""
    return _settings.verbose


def reporter() -> ConsoleReporter:
    """The reporter that a command hands to the core."""
    return ConsoleReporter(quiet=_settings.quiet)


def print_json(document: Any) -> None:
    """Print exactly one JSON document on stdout; NaN and infinity become null."""
    print(escaped(json.dumps(_plain(document), indent=2, ensure_ascii=False)), flush=True)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: Sequence[str] = ()
) -> None:
    """Print a table on stdout under lines of a title: the first column left, figures right.

    A terminal that is too narrow gets it in parts, each with the first column; a pipe as it is.
    """
    table = [[_one_line(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in title:
        print(styled(_fitted(_one_line(line), sys.stdout), BOLD, sys.stdout))
    for number, part in enumerate(_parts(widths)):
        lines = [
            "  ".join(
                row[index].rjust(widths[index]) if index else row[index].ljust(widths[index])
                for index in part
            ).rstrip()
            for row in table
        ]
        if number:
            print()
        print(styled(lines[0], _DIM, sys.stdout))
        print("\n".join(lines[1:]), flush=True)


def _parts(widths: Sequence[int]) -> list[list[int]]:
    """The columns of each part of a table that is to fit the terminal."""
    room = _columns(sys.stdout)
    parts = [[0]]
    for index in range(1, len(widths)):
        part = [*parts[-1], index]
        if len(part) > 2 and sum(widths[i] + 2 for i in part) - 2 > room:
            parts.append([0, index])
        else:
            parts[-1] = part
    return parts


def print_groups(groups: Sequence[tuple[str, Sequence[Sequence[str]]]]) -> None:
    """Print titles on stdout, each with its rows below it, the cells of all rows lined up."""
    clean = [(_one_line(title), [[*map(_one_line, row)] for row in rows]) for title, rows in groups]
    columns = zip(*(row for _, rows in clean for row in rows), strict=True)
    widths = [max(map(len, column)) for column in columns]
    for title, rows in clean:
        print(styled(title, BOLD, sys.stdout))
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print(f"  {'  '.join(cells)}".rstrip())


def print_line(text: str, *, to_stderr: bool = False) -> None:
    """Print text that others may have written a part of."""
    stream = sys.stderr if to_stderr else sys.stdout
    print(_fitted(printable(text), stream), file=stream, flush=True)


def print_path(path: Path) -> None:
    """Print a path on stdout: to a program byte for byte, to a person without what harms."""
    if sys.stdout.isatty():
        print_line(str(path))
        return
    sys.stdout.flush()
    # A name need not be UTF-8, and then the text layer would print a "?" for it.
    sys.stdout.buffer.write(os.fsencode(path) + b"\n")
    sys.stdout.flush()


def print_error(message: str, hint: str | None = None) -> None:
    """Print `error: message` and the next step on stderr.

    Lines that follow the first are set in, so that none looks like a message of its own.
    """
    lines = f"error: {printable(message).strip()}".split("\n")
    text = _fitted("\n  ".join(lines), sys.stderr, indent="  ").removeprefix("error:")
    print(f"{styled('error:', _RED, sys.stderr)}{text}", file=sys.stderr)
    if hint:
        print(_fitted(printable(hint), sys.stderr), file=sys.stderr)


def report(error: Exception) -> int:
    """Explain any failure on stderr, with its traceback where TEAL_DEBUG asks for it.

    Returns:
        The exit code that says as much.
    """
    if os.environ.get("TEAL_DEBUG") == "1":
        print_line("".join(traceback.format_exception(error)).rstrip(), to_stderr=True)
    explained = explain(error)
    print_error(explained.message, explained.hint)
    return explained.exit_code


def end_line() -> None:
    """Leave the line that a terminal has begun with `^C`."""
    if sys.stderr.isatty():
        print(file=sys.stderr)


def confirm(question: str) -> bool:
    """Ask on stderr; only "y" or "yes" is a yes."""
    print(f"{_one_line(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        print(file=sys.stderr)
        return False


def print_dim(message: str, *, end: str = "\n") -> None:
    """Print what is beside an answer on stderr, dim on a terminal; nothing when quiet."""
    if not _settings.quiet:
        text = printable(message)
        if end:  # else a piece of a line, which only the terminal can break
            text = _fitted(text, sys.stderr)
        print(styled(text, _DIM, sys.stderr), file=sys.stderr, end=end, flush=True)


def is_rich(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that can do more than print lines."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def styled(text: str, code: str, stream: TextIO) -> str:
    """`text` in an ANSI style, where `stream` is a terminal that wants colour."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def _columns(stream: TextIO) -> float:
    """How many columns `stream` has; infinitely many where it is no terminal."""
    if not stream.isatty():
        return math.inf
    try:
        own = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        own = 0
    return shutil.get_terminal_size((own or 80, 24)).columns  # COLUMNS, stdout's, or its own


def _fitted(text: str, stream: TextIO, *, indent: str = "") -> str:
    """`text` with its lines broken at spaces, where `stream` is a terminal that is narrower.

    Terminals break within words. A path or a command in backticks stays whole, to be copied. What
    follows a label goes on below itself.
    """
    room = _columns(stream)
    lines: list[str] = []
    for line in text.split("\n"):
        lines.append("")
        label = _LABEL.match(line)
        inset = " " * label.end() if label else indent
        for word in _WORD.findall(line) if len(line) > room else [line]:
            if lines[-1] and len(lines[-1]) + len(word) > room:
                lines.append(inset + word.lstrip())
            else:
                lines[-1] += word
    return "\n".join(lines)


def _one_line(text: str) -> str:
    """Text that others wrote, for a line that is shared with ours."""
    return " ".join(printable(text).splitlines())


class ConsoleReporter:
    """Draws the core's progress on stderr.

    On a terminal a task is a bar with its rate and the time left, replaced by one line when it
    ends; steps of a road share one bar and one line. Elsewhere a task is a line when it starts
    and one when it ends. When quiet, nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._animated = not quiet and is_rich(sys.stderr)
        self._progress: Progress | None = None  # while any task is drawn
        self._road = Road()

    @property
    def animated(self) -> bool:
        """Whether what moves is shown: on a terminal, and not when quiet."""
        return self._animated

    def note(self, message: str) -> None:
        """Print one line, above the bars if there are any."""
        if self._quiet:
            return
        line = _fitted(_one_line(message), sys.stderr)
        if self._progress is not None:
            self._progress.console.print(
                line, markup=False, emoji=False, highlight=False, soft_wrap=True
            )
        else:
            print(line, file=sys.stderr, flush=True)

    def expect(self, costs: Sequence[float | None]) -> None:
        """Number the tasks that come next as steps; no costs end the road that there was."""
        if not self._road.steps:
            self._road = Road()
        self._road.expect(costs)
        if not costs and self._road.steps:
            if self._animated:
                steps = f"{self._road.steps} step{'s' if self._road.steps > 1 else ''}"
                self.note(f"{steps} in {format_seconds(self._road.seconds)}")
            self._road = Road()

    def skip(self) -> None:
        """Count a step that turned out to be done."""
        self._road.begin()

    @contextmanager
    def task(self, label: str, total: int | None = None, unit: str = "it") -> Iterator[Task]:
        """Show a piece of work until the block ends; an error leaves no closing line."""
        label = _one_line(label)
        road = self._road if self._progress is None and self._road.begin() else None
        if road is not None and road.total > 1:
            label = f"step {road.steps} of {road.total}: {label}"
        started = time.monotonic()
        if self._animated:
            with self._bar(label, total, unit, road) as bar:
                yield bar
            done = bar.done
        else:
            size = f" ({format_amount(total, unit)})" if total is not None else ""
            self.note(f"{label}{size} ...")
            line = LineTask()
            yield line
            done = line.done
        elapsed = max(time.monotonic() - started, 1e-9)
        if road is not None:
            road.finish(elapsed)
            if self._animated:
                return
        amount = f"{format_amount(done, unit)} in " if done else ""
        rate = f", {format_rate(done / elapsed, unit)}" if done and elapsed > 0.1 else ""
        self.note(f"{label}: {amount}{format_seconds(elapsed)}{rate}")

    @contextmanager
    def _bar(
        self, label: str, total: int | None, unit: str, road: Road | None
    ) -> Iterator[BarTask]:
        from teal_cli.bar import BarTask, new_progress

        outermost = self._progress is None
        if self._progress is None:
            self._progress = new_progress()
            self._progress.start()
        bar = BarTask(self._progress, label, total, unit, road)
        try:
            yield bar
        finally:
            bar.remove()
            if outermost:
                self._progress.stop()
                self._progress = None
