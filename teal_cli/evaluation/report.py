"""An evaluation's result as tables, and as a JSON, CSV or Markdown file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any, Protocol

from teal_cli.evaluation.statistics import Estimate

Table = tuple[list[str], list[list[str]]]  # column names, rows


class Report(Protocol):
    """What can be rendered."""

    def document(self) -> dict[str, Any]:
        """Everything, ready for JSON."""

    def records(self) -> list[dict[str, Any]]:
        """One flat record a row."""

    def tables(self) -> Iterator[tuple[str, Table]]:
        """What a reader sees, each table with its title."""


def cell(estimate: Estimate | None, digits: int, *, sign: bool = False) -> str:
    """A value with its standard error."""
    if estimate is None:
        return ""
    value = f"{estimate.value:{'+' if sign else ''}.{digits}f}"
    if estimate.standard_error is None:
        return value
    return f"{value} ± {estimate.standard_error:.{digits}f}"


def render(report: Report, suffix: str) -> str:
    """The result as the text of a file with this suffix, one of TABLE_SUFFIXES."""
    if suffix == ".json":
        return json.dumps(report.document(), indent=2, ensure_ascii=False) + "\n"
    return _csv(report) if suffix == ".csv" else _markdown(report)


def _csv(report: Report) -> str:
    """One line a row, model and machine repeated on each so that files can be joined."""
    document = report.document()
    environment = document["environment"]
    common = {
        "model": document["model"]["name"],
        "model_fingerprint": document["model"]["fingerprint"],
        "device": environment["device_name"],
        "torch": environment["versions"].get("torch"),
        "teal": environment["versions"]["teal"],
        "date": environment["date"],
    }
    records = report.records()
    text = io.StringIO()
    # The dense row lacks what compares it with others.
    columns = dict.fromkeys(name for record in records for name in record)
    writer = csv.DictWriter(text, fieldnames=[*columns, *common], lineterminator="\n")
    writer.writeheader()
    writer.writerows(record | common for record in records)
    return text.getvalue()


def _markdown(report: Report) -> str:
    environment = report.document()["environment"]
    parts = []
    for title, (columns, rows) in report.tables():
        if title:
            parts.append(f"{title}.")
        parts.append(
            "\n".join(
                f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)
            )
        )
    versions = ", ".join(f"{name} {value}" for name, value in environment["versions"].items())
    parts.append(f"{environment['device_name']}, {environment['date']}: {versions}.")
    return "\n\n".join(parts) + "\n"
