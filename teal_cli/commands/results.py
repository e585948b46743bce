"""What a command found: on stdout, in the file and in the figure that were asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from teal_cli import console
from teal_cli.report.result import Result, render
from teal_cli.store.artifacts import atomic_write

Drawn = TypeVar("Drawn")


def deliver(result: Result, output: Path | None, *, json: bool) -> None:
    """Print a result, as a reader or a program wants it, and write it to a file."""
    if json:
        console.print_json(result.document())
    else:
        for number, part in enumerate(result.shown()):
            if isinstance(part, str):
                console.print_line(part)
                continue
            if number:
                print()
            console.print_table(part.columns, part.rows, title=part.title)
    if output is not None:
        atomic_write(output, render(result, output.suffix.lower()).encode())


def deliver_figure(draw: Callable[[Drawn, str], bytes], result: Drawn, path: Path | None) -> None:
    """Draw a result to a file, if one was asked for."""
    if path is not None:
        atomic_write(path, draw(result, path.suffix.lower()))
        console.reporter().note(f"plot: {path}")
