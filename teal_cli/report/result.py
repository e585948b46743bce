"""A result as a JSON, CSV or Markdown file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from teal_cli.report.table import Table


class Result(Protocol):
    """What was found, and what is needed to repeat it."""

    def document(self) -> dict[str, Any]:
        """Everything, ready for JSON."""

    def header(self) -> dict[str, Any]:
        """Model and machine, repeated on each line of a CSV file so that files can be joined."""

    def records(self) -> list[dict[str, Any]]:
        """One flat record a row, whose names say the units."""

    def shown(self) -> Iterator[Table | str]:
        """What a reader sees at a terminal: tables, and sentences between them."""

    def written(self) -> Iterator[Table | str]:
        """The same in a Markdown file, which has more room, and says where it was measured."""


def render(result: Result, suffix: str) -> str:
    """The result as the text of a file with this suffix, one of TABLE_SUFFIXES."""
    if suffix == ".json":
        return json.dumps(result.document(), indent=2, ensure_ascii=False) + "\n"
    return _csv(result) if suffix == ".csv" else _markdown(result)


def versions(environment: Mapping[str, Any]) -> str:
    """The versions that an environment names, in one line."""
    return ", ".join(f"{name} {value}" for name, value in environment["versions"].items())


def _csv(result: Result) -> str:
    header, records = result.header(), result.records()
    # A row that is compared with nothing lacks the names of what compares it.
    columns = dict.fromkeys(name for record in records for name in record)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=[*columns, *header], lineterminator="\n")
    writer.writeheader()
    writer.writerows(record | header for record in records)
    return text.getvalue()


def _markdown(result: Result) -> str:
    paragraphs = []
    for part in result.written():
        if isinstance(part, Table):
            if part.title:
                paragraphs.append(f"{' '.join(part.title)}.")
            paragraphs.append(part.markdown())
        else:
            paragraphs.append(part)
    return "\n\n".join(paragraphs) + "\n"
