"""The one way in which every result is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from teal_cli import console
from teal_cli.commands.results import deliver
from teal_cli.report.result import render
from teal_cli.report.table import Table


class Measured:
    """Two rows, of which the first is compared with nothing."""

    def document(self) -> dict[str, Any]:
        return {"model": "Größe", "rows": self.records()}

    def header(self) -> dict[str, Any]:
        return {"device": "CPU, small", "date": "today"}

    def records(self) -> list[dict[str, Any]]:
        return [{"label": "dense", "time_ms": 2.5}, {"label": "sparse", "time_ms": 1, "gap": 0.5}]

    def shown(self) -> Iterator[Table | str]:
        columns = [("", _label), ("ms", lambda row: f"{row['time_ms']:.1f}")]
        yield Table.of(self.records(), columns, title=["What was measured", "where"], figures=True)
        yield "A sentence."
        yield Table.of(self.records()[:1], columns[:1])

    def written(self) -> Iterator[Table | str]:
        yield from self.shown()
        yield "CPU; today"


def _label(row: dict[str, Any]) -> str:
    return str(row["label"])


def test_json_is_the_document() -> None:
    text = render(Measured(), ".json")
    assert json.loads(text) == Measured().document()
    assert "Größe" in text


def test_csv_repeats_the_header_on_each_line_and_leaves_gaps() -> None:
    assert render(Measured(), ".csv").split("\n") == [
        "label,time_ms,gap,device,date",
        'dense,2.5,,"CPU, small",today',
        'sparse,1,0.5,"CPU, small",today',
        "",
    ]


def test_markdown_has_titles_tables_and_sentences_in_order() -> None:
    assert render(Measured(), ".md") == (
        "What was measured where.\n\n"
        "|  | ms |\n| --- | ---: |\n| dense | 2.5 |\n| sparse | 1.0 |\n\n"
        "A sentence.\n\n"
        "|  |\n| --- |\n| dense |\n\n"
        "CPU; today\n"
    )


def test_a_terminal_gets_the_tables_and_a_program_the_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_settings", console._Settings())
    deliver(Measured(), tmp_path / "x.CSV", json=False)
    assert capsys.readouterr().out.splitlines() == [
        "What was measured",
        "where",
        "         ms",
        "dense   2.5",
        "sparse  1.0",
        "A sentence.",
        "",
        "",
        "dense",
    ]
    assert (tmp_path / "x.CSV").read_text() == render(Measured(), ".csv")
    deliver(Measured(), None, json=True)
    assert json.loads(capsys.readouterr().out) == Measured().document()
