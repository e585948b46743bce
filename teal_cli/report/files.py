"""The files that a result is written to: which formats there are, and what they need."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from teal_cli.errors import MissingError, UsageError
from teal_cli.faults import reason
from teal_cli.store import artifacts

TABLE_SUFFIXES = (".json", ".csv", ".md")
FIGURE_SUFFIXES = (".png", ".pdf", ".svg")


def check_table(path: Path | None) -> None:
    """Make sure, before anything is measured for it, that a table can be written to `path`.

    Raises:
        UsageError: the name says no format that there is, or the place takes no file.
    """
    if path is not None:
        _check_suffix(path, TABLE_SUFFIXES, "--output")
        _check_place(path, "--output")


def check_figure(path: Path | None) -> None:
    """Make sure, before anything is measured for it, that a figure can be drawn to `path`.

    Raises:
        UsageError: the name says no format that there is, or the place takes no file.
        MissingError: matplotlib is not installed.
    """
    if path is not None:
        _check_suffix(path, FIGURE_SUFFIXES, "--plot")
        if find_spec("matplotlib") is None:
            raise MissingError(
                "--plot needs matplotlib, which is not installed",
                hint="Install it with: pip install 'teal-cli[plot]'",
            )
        _check_place(path, "--plot")


def _check_suffix(path: Path, suffixes: Sequence[str], option: str) -> None:
    if path.suffix.lower() not in suffixes:
        raise UsageError(
            f"{option} {path}: the name must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}"
        )


def _check_place(path: Path, option: str) -> None:
    try:
        artifacts.check_writable(path)
    except OSError as error:
        if not path.parent.is_dir():
            raise UsageError(
                f"{option} {path}: there is no folder {path.parent}",
                hint="Make it, or name another.",
            ) from None
        sentence, hint = reason(error)
        raise UsageError(f"{option} {path} cannot be written: {sentence}", hint=hint) from None
