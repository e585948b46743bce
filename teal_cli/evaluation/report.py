"""What the reports of perplexity and of tasks share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from teal_cli.evaluation.statistics import Estimate
from teal_cli.report.result import versions


def cell(estimate: Estimate | None, digits: int, *, sign: bool = False) -> str:
    """A value with its standard error."""
    if estimate is None:
        return ""
    value = f"{estimate.value:{'+' if sign else ''}.{digits}f}"
    if estimate.standard_error is None:
        return value
    return f"{value} ± {estimate.standard_error:.{digits}f}"


def header(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Model and machine, for each line of a CSV file."""
    environment = inputs["environment"]
    return {
        "model": inputs["model"]["name"],
        "model_fingerprint": inputs["model"]["fingerprint"],
        "device": environment["device_name"],
        "torch": environment["versions"].get("torch"),
        "teal": environment["versions"]["teal"],
        "date": environment["date"],
    }


def footer(inputs: Mapping[str, Any]) -> str:
    """Machine, date and versions, below the tables of a Markdown file."""
    environment = inputs["environment"]
    return f"{environment['device_name']}, {environment['date']}: {versions(environment)}."
