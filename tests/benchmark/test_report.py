"""Rows, tables, files and the figure of a result whose figures are known."""

from __future__ import annotations

import csv
import io
import json

import pytest
from benchmark.subjects import made_up_result

from teal_cli.benchmark import plot, report
from teal_cli.benchmark.cost import token_bytes
from teal_cli.model.random_weights import SHAPES


def test_rows_hold_speed_share_and_paired_speedups() -> None:
    dense, sparse, baseline = made_up_result().rows
    assert dense.tokens_per_s.median == pytest.approx(10)
    assert dense.tokens_per_s.low < 10 < dense.tokens_per_s.high
    assert sparse.time_per_token_ms.median == pytest.approx(60)
    assert sparse.speedup["dense"].median == pytest.approx(1 / 0.6)
    assert sparse.speedup["dense"].low == pytest.approx(1 / 0.6)  # each repeat's noise is shared
    assert sparse.speedup["transformers"].median == pytest.approx(2.5)
    assert baseline.speedup["dense"].median == pytest.approx(2 / 3)
    assert "dense" not in dense.speedup
    config = SHAPES["tinyllama-1.1b"]
    at_realised = token_bytes(config, itemsize=2, sparsity=0.49, position=82).total
    assert sparse.bytes_per_token == at_realised
    assert sparse.bandwidth_share == pytest.approx(at_realised / 0.06 / 30e9)


def test_table_has_a_column_for_each_reference() -> None:
    columns, lines = report.result_table(made_up_result().rows)
    assert columns[-2:] == ["× dense", "× transformers"]
    assert all(len(line) == len(columns) for line in lines)
    assert lines[1][:2] == ["sparse 0.5", "0.490"]
    assert lines[1][-1] == "2.50 [2.50–2.50]"


def test_card_tells_ceilings_apart() -> None:
    card = made_up_result().card
    assert [row.sparsity for row in card] == [0.0, 0.5]
    assert card[0].ceiling_tokens_per_s == pytest.approx(30e9 / card[0].bytes.total)
    _, lines = report.card_table(card)
    assert lines[0][1] == "1.94 GB"
    assert lines[1][1] == "969 MB"


def test_json_is_the_whole_result() -> None:
    document = json.loads(report.render(made_up_result(), ".json"))
    assert (document["kind"], document["schema"]) == ("bench", 1)
    assert document["rows"][1]["speedup"]["dense"]["median"] == pytest.approx(1 / 0.6)
    assert document["notes"] == ["no --baseline compile: there is no compiler"]


def test_csv_has_one_line_a_row() -> None:
    lines = list(csv.DictReader(io.StringIO(report.render(made_up_result(), ".csv"))))
    assert [line["label"] for line in lines] == ["dense", "sparse 0.5", "transformers"]
    assert float(lines[1]["speedup_over_dense"]) == pytest.approx(1 / 0.6)
    assert lines[0]["speedup_over_dense"] == ""
    assert lines[2]["device"] == "Test CPU"


def test_markdown_has_both_tables() -> None:
    text = report.render(made_up_result(), ".md")
    assert text.count("| --- |") == 2
    assert "no --baseline compile" in text
    assert "30.0 GB/s" in text


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_figure_is_drawn(suffix: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    assert plot.draw(made_up_result(), suffix).startswith(magic)
