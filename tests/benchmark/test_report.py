"""Rows, tables, files and the figure of a result whose figures are known."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from benchmark.subjects import made_up_result

from teal_cli.benchmark import plot, report
from teal_cli.benchmark.bandwidth import Bandwidth
from teal_cli.benchmark.cost import token_bytes
from teal_cli.benchmark.report import BenchReport
from teal_cli.benchmark.result import Variant, rows
from teal_cli.benchmark.timing import Run
from teal_cli.model.random_weights import SHAPES
from teal_cli.report.result import render
from teal_cli.report.table import Table


def _cells(table: Table) -> tuple[list[str], list[list[str]]]:
    assert all(len(row) == len(table.columns) for row in table.rows)
    return table.columns, table.rows


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


def test_prompt_speed_is_its_tokens_over_the_time_to_the_first() -> None:
    dense = made_up_result().rows[0]
    assert dense.prompt_tokens_per_s.median == pytest.approx(32 / 0.2)
    assert dense.time_to_first_token_ms.median == pytest.approx(200)


@pytest.mark.parametrize(("fastest", "how"), [(30e9, "b, the fastest read"), (5e9, "row sparse")])
def test_no_row_exceeds_the_ceiling(fastest: float, how: str) -> None:
    config = SHAPES["tinyllama-1.1b"]
    variants = [
        Variant("dense", "dense", "float16", 2, "numba"),
        Variant("sparse 0.5", "sparse", "float16", 2, "numba", 0.5),
    ]
    runs = {
        "dense": [Run(0.2, 0.2)] * 3,
        "sparse 0.5": [Run(0.2, t, 0.5) for t in (0.1, 0.09, 0.2)],
    }
    reads = [Bandwidth(4e9, "a"), Bandwidth(fastest, "b"), Bandwidth(3e9, "c")]
    bandwidth, found = rows(variants, runs, config, reads, prompt_tokens=32, position=82)
    assert how in bandwidth.how
    assert bandwidth.bytes_per_s == max(fastest, found[1].bytes_per_token / 0.09)
    assert all(0 < row.bandwidth_share <= 1 for row in found)


def test_the_terminals_table_fits_a_hundred_columns() -> None:
    result = made_up_result()
    columns, lines = _cells(report.short_table(result.rows))
    widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
    assert sum(widths) + 2 * (len(widths) - 1) <= 100
    assert lines[1][0] == "sparse 0.5"
    assert lines[1][2:6] == ["16.7 ±1%", "160.0", "200 ms", "62%"]
    assert lines[1][-2:] == ["1.67", "2.50"]
    sentences = [part for part in BenchReport(result).shown() if isinstance(part, str)]
    assert sentences == ["transformers: bfloat16, generate, static cache", *result.notes]


def test_speed_has_one_unit() -> None:
    result = made_up_result()
    for text in (render(BenchReport(result), ".md"), str(report.short_table(result.rows))):
        assert "tokens/s" in text
        assert not re.search(r"\btok/s|\bt/s|tokens per second", text)


def test_table_has_a_column_for_each_reference() -> None:
    columns, lines = _cells(report.result_table(made_up_result().rows))
    assert columns[-2:] == ["× dense", "× transformers"]
    assert lines[1][:2] == ["sparse 0.5", "0.490"]
    assert lines[1][-1] == "2.50 [2.50–2.50]"


def test_card_tells_ceilings_apart() -> None:
    card = made_up_result().card
    assert [row.sparsity for row in card] == [0.0, 0.5]
    assert card[0].ceiling_tokens_per_s == pytest.approx(30e9 / card[0].bytes.total)
    _, lines = _cells(report.card_table(card))
    assert lines[0][1] == "1.94 GB"
    assert lines[1][1] == "969 MB"


def test_json_is_the_whole_result() -> None:
    document = json.loads(render(BenchReport(made_up_result()), ".json"))
    assert (document["kind"], document["schema"]) == ("bench", 1)
    assert document["rows"][1]["speedup"]["dense"]["median"] == pytest.approx(1 / 0.6)
    assert document["notes"] == ["no --baseline compile: there is no compiler"]


def test_csv_has_one_line_a_row() -> None:
    lines = list(csv.DictReader(io.StringIO(render(BenchReport(made_up_result()), ".csv"))))
    assert [line["label"] for line in lines] == ["dense", "sparse 0.5", "transformers"]
    assert float(lines[1]["speedup_over_dense"]) == pytest.approx(1 / 0.6)
    assert lines[0]["speedup_over_dense"] == ""
    assert lines[2]["device"] == "Test CPU"


def test_markdown_has_both_tables() -> None:
    text = render(BenchReport(made_up_result()), ".md")
    assert text.count("| --- |") == 2
    assert "no --baseline compile" in text
    assert "30.0 GB/s" in text


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_figure_is_drawn(suffix: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    assert plot.draw(made_up_result(), suffix).startswith(magic)
