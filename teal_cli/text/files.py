"""Text out of a user's own file: plain text, JSON lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from teal_cli.errors import MissingError, TealError, UsageError, whole
from teal_cli.store.local import open_regular

DEFAULT_COLUMN = "text"


def read_file(path: Path, column: str | None = None) -> Iterator[str]:
    """The texts in a file, a row at a time; a plain text file is one row.

    Args:
        path: .jsonl and .parquet are tables; anything else is read as UTF-8 text.
        column: the table's text column, by default `text`.

    Raises:
        MissingError: there is no such file.
        UsageError: the table has no such column, or a column was named for plain text.
        TealError: the file cannot be read as what its name says, or is a pipe or a device.
    """
    if not path.exists():
        raise MissingError(f"there is no file {path}", hint="Check the path given to --dataset.")
    if path.is_dir():
        raise UsageError(
            f"{path} is a folder", hint="Name one .txt, .jsonl or .parquet file in it."
        )
    open_regular(path).close()
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _read_json_lines(path, column)
    if suffix == ".parquet":
        return _read_parquet(path, column)
    if column is not None:
        raise UsageError(f"{path} is plain text and has no columns", hint="Leave out --column.")
    return _read_text(path)


def text_of(row: Any, column: str | None, columns: Sequence[str], source: str) -> str:
    """A row's text; `columns` are the ones to name when it is not there."""
    wanted = column or DEFAULT_COLUMN
    if wanted not in columns:
        raise UsageError(
            f"{source} has no column {wanted!r}; it has: {', '.join(columns) or 'none'}",
            hint="Name the one with the text: --column NAME.",
        )
    value = row[wanted]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UsageError(
            f"column {wanted!r} of {source} holds {type(value).__name__}, not text",
            hint="Name the one with the text: --column NAME.",
        )
    return value


def _read_text(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise TealError(
            f"{path} is not UTF-8 text",
            hint="Give a text file, or a table whose name ends in .jsonl or .parquet.",
        )
    yield text


def _read_json_lines(path: Path, column: str | None) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    detail = getattr(error, "msg", error)
                    raise TealError(f"{path}, line {number} is not JSON: {detail}") from None
                if not isinstance(row, dict):
                    raise TealError(f"{path}, line {number} is not a JSON object")
                yield text_of(row, column, list(row), f"{path}, line {number},")
        except UnicodeDecodeError:
            raise TealError(f"{path} is not UTF-8 text") from None


def _read_parquet(path: Path, column: str | None) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            wanted = column or DEFAULT_COLUMN
            chosen = [wanted] if wanted in columns else None
            for batch in file.iter_batches(batch_size=1024, columns=chosen):
                for row in batch.to_pylist():
                    yield text_of(row, column, columns, str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise TealError(f"{path} is not a readable Parquet file: {whole(error)}") from None
